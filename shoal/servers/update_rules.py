"""When a push changes the parameters, and who has to wait: synchronous rounds, or on arrival."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.servers.core import ParameterServer, Policy, Push
from shoal.servers.merge import Merge

Schedule = Callable[[int], float]  # step -> learning rate
CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
WHOLE = 1e-6  # shares that add up to a step do so up to rounding


def clip(gradient: Tensor, norm: float, max_norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_ does it, to the last bit; `max_norm` 0: not at all."""
    if max_norm:
        known = torch.tensor(norm, dtype=gradient.dtype)
        gradient.mul_((max_norm / (known + CLIP_EPSILON)).clamp(max=1.0))


class Rounds(Policy):
    """Bulk synchronous: an update a step, of what the first `quorum` workers have pushed for it (None: all of them).

    What comes later for that step is dropped: with K of N, N - K workers are backups (Chen et al. 2016, "Revisiting
    Distributed Synchronous SGD", section 3). Holds the gradients of a round, 4 bytes x parameters x workers.
    The norm to clip by is that over all servers, so a round is closed in two moves: once it is full, workers are told
    this server's part of it; the first of them to ask for the next parameters brings the whole.
    """

    def __init__(self, merge: Merge, schedule: Schedule, *, quorum: int | None, max_norm: float) -> None:
        self.merge = merge
        self.schedule = schedule
        self.quorum = quorum
        self.max_norm = max_norm
        self.round = 0
        self.pushes: dict[int, Push] = {}
        self.full = False
        self.merged: dict[int, float] = {}  # step -> squares of the merged gradient, of the last two
        self.late = 0  # pushes dropped

    def begin(self, server: ParameterServer, first_step: int) -> None:
        """The first round is the first step."""
        self.round = first_step

    def take(self, server: ParameterServer, push: Push) -> None:
        """Keep it for its round, and merge the round if that makes it full."""
        if push.step < self.round or self.full:
            self.late += 1
            return
        self.pushes[push.worker] = push
        self._merge_if_full(server)

    def answers(self, server: ParameterServer, step: int) -> bool:
        """When the round is full."""
        return step < self.round or self.full

    def squares(self, step: int) -> float:
        """Of a gradient merged last, or just before: the next round may fill while its answer is on the way."""
        return self.merged.get(step, -1.0)

    def settle(self, server: ParameterServer, clock: int, norm: float) -> None:
        """Apply the merged gradient, clipped by `norm`; with an infinite one nothing changes."""
        if not self.full or clock != self.round + 1 or math.isnan(norm):
            return
        if math.isfinite(norm):
            clip(server.gradient, norm, self.max_norm)
            server.update(self.schedule(self.round))
            server.version += len(self.pushes)
        self.round += 1
        self.full = False
        self.pushes.clear()

    def opens(self, server: ParameterServer, clock: int) -> bool:
        """When every round before `clock` is over."""
        return self.round >= clock

    def lost(self, server: ParameterServer, worker: int) -> None:
        """The round may be full without it, or never."""
        self._merge_if_full(server)

    def clock(self, server: ParameterServer) -> int:
        """The round."""
        return self.round

    def _merge_if_full(self, server: ParameterServer) -> None:
        left = len(server.active | self.pushes.keys())
        # Workers that have no steps left ask for none.
        ended = len(server.clocks) - len(server.active | server.gone)
        needed = max(1, (self.quorum or len(server.clocks)) - ended)
        if 0 < left < needed:
            server.failure = (
                f"strategy server: {left} of {len(server.clocks)} workers are left at step {self.round + 1}, and an "
                f"update needs {needed}; a lower --quorum survives this; go on with --resume-from-checkpoint latest"
            )
        elif not self.full and self.pushes and len(self.pushes) >= needed:
            self.merge([push for _, push in sorted(self.pushes.items())], server.gradient)
            self.merged[self.round] = server.norm() ** 2
            self.merged.pop(self.round - 2, None)
            self.full = True


class Arrivals(Policy):
    """Asynchronous: nobody waits for a slower worker; every `collect` pushes, whoever made them, are an update.

    With 1 each is an update of its own, at once. More are averaged, as FedBuff does (Nguyen et al. 2022,
    "Federated Learning with Buffered Asynchronous Aggregation", from memory): as many as workers make updates of as
    many labels as synchronous training, which an adaptive optimizer needs to see its direction.

    Pushes of tau updates ago count less with `staleness_lr`: rate / max(1, mean tau) (Zhang et al. 2016,
    "Staleness-aware Async-SGD", equation 6; from memory), and are corrected by `delay_compensation`:
    g + lambda g g (theta - theta that g was taken at) (Zheng et al. 2017, DC-ASGD, equation 10; lambda 0.04 is the
    published constant), which holds up to two copies of the parameters for each worker, three where it is ahead.

    The update is made at the rate of the labels seen so far, times share ** `share_power`: as a batch that is so much
    smaller than the step needs it, 1 for SGD (Goyal et al. 2017), 1/2 for Adam (Malladi et al. 2022).
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        collect: int = 1,
        staleness_lr: bool = False,
        delay_compensation: float = 0.0,
        share_power: float = 1.0,
    ) -> None:
        self.schedule = schedule
        self.collect = collect
        self.staleness_lr = staleness_lr
        self.delay_compensation = delay_compensation
        self.share_power = share_power
        self.seen = 0.0  # in steps
        self.waiting: list[tuple[float, int]] = []  # share and staleness of the pushes that are collected
        self.backups: dict[int, dict[int, Tensor]] = {}  # worker -> version -> the parameters it was given

    def begin(self, server: ParameterServer, first_step: int) -> None:
        """The schedule goes on from `first_step`, at which every worker holds the same parameters."""
        self.seen = float(first_step)
        for worker in server.clocks:
            self.gave(server, worker)

    def take(self, server: ParameterServer, push: Push) -> None:
        """Add it to the others that wait, and apply them if they are enough."""
        self.staleness = server.version - push.version
        counts = push.gradient is not None and push.labels > 0
        if counts:
            self._add(server, push)
        else:
            self.seen += push.share
        self.waiting.append((push.share if counts else 0.0, self.staleness))
        self._update_if_enough(server)

    def answers(self, server: ParameterServer, step: int) -> bool:
        """At once."""
        return True

    def opens(self, server: ParameterServer, clock: int) -> bool:
        """When every worker has taken the steps before `clock`."""
        return all(server.clocks[worker] >= clock for worker in server.active)

    def gave(self, server: ParameterServer, worker: int) -> None:
        """Keep what the worker was given, until it has pushed what it made of it."""
        if not self.delay_compensation:
            return
        held = [versions[server.version] for versions in self.backups.values() if server.version in versions]
        copy = held[0] if held else server.flat.clone()
        self.backups.setdefault(worker, {})[server.version] = copy

    def lost(self, server: ParameterServer, worker: int) -> None:
        """What it was given is of no use any more; what waits may be enough for those that are left."""
        self.backups.pop(worker, None)
        self._update_if_enough(server)

    def _update_if_enough(self, server: ParameterServer) -> None:
        if not self.waiting or len(self.waiting) < min(self.collect, len(server.active)):
            return
        shares = [share for share, _ in self.waiting if share]
        if shares:
            whole, late = sum(shares), [staleness for share, staleness in self.waiting if share]
            rate = self.schedule(int(self.seen + WHOLE)) * whole**self.share_power
            server.update(rate / max(1.0, sum(late) / len(late)) if self.staleness_lr else rate)
            server.version += len(shares)
            self.seen += whole
        self.waiting.clear()

    def _add(self, server: ParameterServer, push: Push) -> None:
        """Have the server's gradient be the mean over the labels of what is collected."""
        assert push.gradient is not None
        before = sum(share for share, _ in self.waiting)
        whole = before + push.share
        if before:
            server.gradient.mul_(before / whole).add_(push.gradient, alpha=1 / whole)
        else:  # the common case is one pass over memory, which is what a server's time goes to
            torch.div(push.gradient, whole, out=server.gradient)
        backups = self.backups.get(push.worker, {})
        if not self.delay_compensation or push.version not in backups:  # none for who was thought to be gone
            return
        drift = server.flat - backups[push.version]
        for version in [version for version in backups if version < push.version]:
            del backups[version]
        each = self.delay_compensation / push.share  # the rule is that of a gradient a label
        server.gradient.addcmul_(push.gradient.square(), drift, value=each / whole)
