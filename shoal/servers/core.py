"""The server itself: one range of the parameters, their optimizers, and what it knows of each worker.

It never waits and starts no thread: its callers do. So the same class runs behind a lock and real connections in
`host`, and under scripted delays in the tests.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from shoal.errors import PeerLost
from shoal.optim.optimizers import NamedParams, NamedState


class Halted(PeerLost):
    """Too few workers are left for the server to go on, or the server itself is gone: `why`, in words."""

    def __init__(self, why: str) -> None:
        super().__init__(None, f"training by servers ({why})", why)


END = 2**62  # the clock of a worker that has taken its last step


def norm_of(squares: float) -> float:
    """The norm from the sum of squares in a reply; infinite if that is not finite, NaN if it is not known."""
    if squares < 0:
        return math.nan
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


@dataclass(frozen=True)
class Push:
    """A worker's gradient for one of its steps; (worker, step) identifies it.

    `gradient` [n] is that of the summed loss of the worker's share, divided by the labels of the whole step: the
    pushes of all workers add up to the gradient of the step. None: it was not finite, and only the step is counted.
    """

    worker: int
    step: int
    version: int  # of the parameters at which it was computed
    labels: int  # of the worker's share
    step_labels: int
    gradient: Tensor | None

    @property
    def share(self) -> float:
        """The labels of the worker's share, as a part of those of the step."""
        return self.labels / max(1, self.step_labels)


class UpdateRule(ABC):
    """When pushes change the parameters, and when a worker may have them."""

    staleness = 0  # of the last push, in updates
    bound = (
        -1
    )  # how many steps a worker may be ahead of the last one: workers keep to it; negative: any number

    def begin(self, server: "ParameterServer", first_step: int) -> None:
        """Start: every worker holds the server's parameters, and `first_step` is its next step."""
        return

    @abstractmethod
    def receive(self, server: "ParameterServer", push: Push) -> None:
        """Process a push that has not come before."""

    @abstractmethod
    def answers(self, server: "ParameterServer", step: int) -> bool:
        """Whether the outcome of a worker's push for `step` is known."""

    @abstractmethod
    def opens(self, server: "ParameterServer", clock: int) -> bool:
        """Whether the parameters contain what is needed of every worker's steps before `clock`."""

    def squares(self, step: int) -> float:
        """The sum of the squares of the gradient of `step`; negative: it is not known, or not any more."""
        return -1.0

    def close_round(self, server: "ParameterServer", clock: int, norm: float) -> None:
        """A worker asks for the parameters after all steps before `clock`, and knows the norm over all servers."""
        return

    def sent(self, server: "ParameterServer", worker: int) -> None:
        """The current parameters were sent to the worker."""
        return

    def lost(self, server: "ParameterServer", worker: int) -> None:
        """The worker will not push any more, unless it comes back."""
        return

    def clock(self, server: "ParameterServer") -> int:
        """The first step whose pushes still count: a worker that is behind may leave out those before it."""
        return 0


class ParameterServer:
    """Holds a flat copy of `params`, and changes it as `rule` says, with the optimizers that `build` makes.

    `version` is the number of pushes that its parameters contain. Holds 4 bytes for each of its parameters and for
    each of their gradients, beside what the optimizers hold (8 with AdamW) and what the rule holds.
    """

    def __init__(
        self, params: NamedParams, build: Callable[[NamedParams], list[Optimizer]], rule: UpdateRule
    ) -> None:
        sizes = [p.numel() for _, p in params]
        self.flat = torch.cat([p.detach().reshape(-1).cpu() for _, p in params])
        self.gradient = torch.zeros_like(self.flat)
        self.params: NamedParams = []
        parts = zip(params, self.flat.split(sizes), self.gradient.split(sizes), strict=True)
        for (name, p), values, gradient in parts:
            own = nn.Parameter(values.view(p.shape))
            own.grad = gradient.view(p.shape)
            self.params.append((name, own))
        self.optimizers = build(self.params)
        self.rule = rule
        self.version = 0
        self.rate = 0.0  # of the last update
        self.clocks: dict[int, int] = {}  # the next step of every worker ever known
        self.parted: set[int] = set()  # those that have left in order
        self.gone: set[int] = set()  # those that were lost
        self.failure = ""  # why nobody can go on, in words; empty: all can

    @property
    def numel(self) -> int:
        """How many parameters it holds."""
        return self.flat.numel()

    @property
    def active(self) -> set[int]:
        """The workers that still have steps to take."""
        return {worker for worker, clock in self.clocks.items() if clock != END} - self.parted - self.gone

    @property
    def optimizer_state(self) -> NamedState:
        """The optimizers' state, named by parameter."""
        return NamedState(self.optimizers, self.params)

    def begin(self, params: NamedParams, workers: Iterable[int], first_step: int) -> None:
        """Start from these values, with workers that hold the same, and whose next step is `first_step`."""
        for (_, own), (_, p) in zip(self.params, params, strict=True):
            own.data.copy_(p.detach())
        self.clocks = dict.fromkeys(workers, first_step)
        self.rule.begin(self, first_step)
        for worker in self.gone | self.parted:
            self.rule.lost(self, worker)

    def join(self, worker: int) -> None:
        """A worker has come, or come back. A new one starts at the step of the slowest of the others."""
        if worker not in self.clocks and self.active:
            self.clocks[worker] = min(self.clocks[other] for other in self.active)
        self.parted.discard(worker)
        self.gone.discard(worker)

    def leave(self, worker: int, *, parted: bool) -> None:
        """A worker has `parted` in order, or was lost."""
        (self.parted if parted else self.gone).add(worker)
        self.rule.lost(self, worker)

    def push(self, push: Push) -> bool:
        """Process a push, unless it has come before. Returns whether it was new."""
        if push.step < self.clocks[push.worker]:
            return False
        self.clocks[push.worker] = push.step + 1
        self.rule.receive(self, push)
        return True

    def answers(self, step: int) -> bool:
        """Whether the outcome of a worker's push for `step` is known."""
        return self.rule.answers(self, step)

    def ask(self, worker: int, clock: int, norm: float) -> None:
        """A worker asks for the parameters after all steps before `clock`; END: after every worker's last.

        `norm` is that of the gradient over all servers; NaN: the worker does not know it.
        """
        if clock == END:
            self.clocks[worker] = END
            self.rule.lost(self, worker)
        else:
            self.rule.close_round(self, clock, norm)

    def opens(self, clock: int) -> bool:
        """Whether the parameters contain what is needed of every worker's steps before `clock`."""
        return not self.active if clock == END else self.rule.opens(self, clock)

    def read(self, worker: int, into: Tensor) -> None:
        """Copy the parameters into `into` [n], for the worker to compute with."""
        into.copy_(self.flat)
        self.rule.sent(self, worker)

    def norm(self) -> float:
        """The norm of `gradient`, computed as elsewhere: the norm of the parameters' norms."""
        return get_total_norm([p.grad for _, p in self.params if p.grad is not None]).item()

    def update(self, rate: float) -> None:
        """Apply `gradient` by the optimizers at this rate."""
        self.rate = rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
