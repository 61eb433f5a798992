"""When a push changes the parameters, and who has to wait: synchronous rounds, or on arrival."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.servers.core import ParameterServer, Push, UpdateRule
from shoal.servers.merge import Merge

Schedule = Callable[[int], float]  # step -> learning rate
CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
WHOLE = 1e-6  # the shares of a step add up to 1 but for rounding


def clip(gradient: Tensor, norm: float, max_norm: float) -> None:
    """Clip as torch.nn.utils.clip_grad_norm_ does, with the same bits; `max_norm` 0: not at all."""
    if max_norm:
        known = torch.tensor(norm, dtype=gradient.dtype)
        gradient.mul_((max_norm / (known + CLIP_EPSILON)).clamp(max=1.0))


class Rounds(UpdateRule):
    """Bulk synchronous: one update a step, from the pushes of the first `quorum` workers (None: all workers).

    What comes later for that step is dropped: with K of N, N - K workers are backups (Chen et al. 2016, "Revisiting
    Distributed Synchronous SGD", section 3). Holds the gradients of a round, 4 bytes x parameters x workers.
    The norm to clip by is that over all servers, so a round is closed in two moves: once it is full, the workers get
    this server's part of the norm; the first of them to ask for the next parameters brings the whole.
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
        self.round = first_step

    def receive(self, server: ParameterServer, push: Push) -> None:
        if push.step < self.round or self.full:
            self.late += 1
            return
        self.pushes[push.worker] = push
        self._merge_if_full(server)

    def answers(self, server: ParameterServer, step: int) -> bool:
        return step < self.round or self.full

    def squares(self, step: int) -> float:
        # Of the last two rounds: the next one may fill while the answer about the one before is under way.
        return self.merged.get(step, -1.0)

    def close_round(self, server: ParameterServer, clock: int, norm: float) -> None:
        # Apply the merged gradient, clipped by `norm`; if that is infinite the parameters stay.
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
        return self.round >= clock

    def lost(self, server: ParameterServer, worker: int) -> None:
        # The round may be full without it, or never.
        self._merge_if_full(server)

    def clock(self, server: ParameterServer) -> int:
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


class Arrivals(UpdateRule):
    """Asynchronous: nobody waits for a slower worker; every `collect` pushes, of any workers, are an update.

    With 1 each push is an update at once. More are averaged, as FedBuff does (Nguyen et al. 2022, "Federated Learning
    with Buffered Asynchronous Aggregation", from memory): with `collect` equal to the number of workers an update
    covers as many labels as in synchronous training, which an adaptive optimizer needs to see a direction.

    Pushes that are tau updates old count less with `staleness_lr`: rate / max(1, mean tau) (Zhang et al. 2016,
    "Staleness-aware Async-SGD", equation 6; from memory), and are corrected by `delay_compensation`:
    g + lambda g g (theta - theta at which g was computed) (Zheng et al. 2017, DC-ASGD, equation 10; lambda 0.04 is
    the published constant), which holds up to two copies of the parameters for each worker, three where it is ahead.

    The rate is that of the schedule at the labels seen so far, times share ** `share_power`: the scaling for a batch
    that is smaller than the step by the factor share, 1 for SGD (Goyal et al. 2017), 1/2 for Adam (Malladi et al.
    2022).
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
        self.backups: dict[int, dict[int, Tensor]] = {}  # worker -> version -> the parameters sent to it

    def begin(self, server: ParameterServer, first_step: int) -> None:
        self.seen = float(first_step)
        for worker in server.clocks:
            self.sent(server, worker)

    def receive(self, server: ParameterServer, push: Push) -> None:
        self.staleness = server.version - push.version
        counts = push.gradient is not None and push.labels > 0
        if counts:
            self._add(server, push)
        else:
            self.seen += push.share
        self.waiting.append((push.share if counts else 0.0, self.staleness))
        self._update_if_enough(server)

    def answers(self, server: ParameterServer, step: int) -> bool:
        return True

    def opens(self, server: ParameterServer, clock: int) -> bool:
        # When every worker has done the steps before `clock`.
        return all(server.clocks[worker] >= clock for worker in server.active)

    def sent(self, server: ParameterServer, worker: int) -> None:
        # Keep the parameters until the worker has pushed the gradient that it computes at them.
        if not self.delay_compensation:
            return
        held = [versions[server.version] for versions in self.backups.values() if server.version in versions]
        copy = held[0] if held else server.flat.clone()
        self.backups.setdefault(worker, {})[server.version] = copy

    def lost(self, server: ParameterServer, worker: int) -> None:
        # The pushes that wait may be enough for an update, now that fewer workers are left.
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
        """Make the server's gradient the mean per label of the collected pushes."""
        assert push.gradient is not None
        before = sum(share for share, _ in self.waiting)
        whole = before + push.share
        if before:
            server.gradient.mul_(before / whole).add_(push.gradient, alpha=1 / whole)
        else:  # the common case in one pass over memory, which takes most of a server's time
            torch.div(push.gradient, whole, out=server.gradient)
        backups = self.backups.get(push.worker, {})
        if (
            not self.delay_compensation or push.version not in backups
        ):  # there is none of a worker that was lost and came back
            return
        drift = server.flat - backups[push.version]
        for version in [version for version in backups if version < push.version]:
            del backups[version]
        each = self.delay_compensation / push.share  # the rule is for a gradient per label
        server.gradient.addcmul_(push.gradient.square(), drift, value=each / whole)
