"""The server itself: one range of the parameters, their optimizers, and what it knows of each worker.

It never waits and starts no thread: whoever calls it does. The same class thus stands behind a lock and real lines
in `host`, and behind a script of delays in `simulator`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from shoal.optim.optimizers import NamedParams, NamedState


class Halted(RuntimeError):
    """Too few workers are left for the server to go on."""


END = 2**62  # the clock of a worker that has taken its last step


def norm_of(squares: float) -> float:
    """Of the sum of squares that a server tells; infinite if it is not finite, NaN if it is not known."""
    if squares < 0:
        return math.nan
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


@dataclass(frozen=True)
class Push:
    """A worker's gradient for one of its steps; (worker, step) is its identity.

    `gradient` [n] is the sum over the worker's share of the loss divided by the labels of the whole step: pushes of
    all workers add up to the gradient of the step. None: it was not finite, and only the step is to be counted.
    """

    worker: int
    step: int
    version: int  # of the parameters it was taken at
    labels: int  # of the worker's share
    step_labels: int
    gradient: Tensor | None

    @property
    def share(self) -> float:
        """The part of the step's labels that it stands for."""
        return self.labels / max(1, self.step_labels)


class Policy(ABC):
    """When pushes change the parameters, and when a worker may have them."""

    staleness = 0  # of the last push, in updates
    bound = -1  # how many steps a worker may be ahead of the last one, which it sees to; negative: any number

    def begin(self, server: "ParameterServer", first_step: int) -> None:
        """Every worker holds the server's parameters, and takes `first_step` next."""
        return

    @abstractmethod
    def take(self, server: "ParameterServer", push: Push) -> None:
        """A push that has not come before."""

    @abstractmethod
    def answers(self, server: "ParameterServer", step: int) -> bool:
        """Whether a worker that pushed for `step` can be told what became of it."""

    @abstractmethod
    def opens(self, server: "ParameterServer", clock: int) -> bool:
        """Whether the parameters contain what is needed of every worker's steps before `clock`."""

    def squares(self, step: int) -> float:
        """The sum of the squares of the gradient of `step`; negative: it is not known, or not any more."""
        return -1.0

    def settle(self, server: "ParameterServer", clock: int, norm: float) -> None:
        """A worker that asks for the parameters after all steps before `clock` tells the norm over all servers."""
        return

    def gave(self, server: "ParameterServer", worker: int) -> None:
        """The worker has been given the parameters as they are."""
        return

    def lost(self, server: "ParameterServer", worker: int) -> None:
        """The worker will not push any more, for now at least."""
        return

    def clock(self, server: "ParameterServer") -> int:
        """Before which step nothing is taken any more: a worker that is behind may leave out the steps between."""
        return 0


class ParameterServer:
    """Holds `params` (copies are taken) flat, and changes them as `policy` says, with optimizers from `build`.

    `version` is the number of pushes that its parameters contain. Costs 4 bytes for each of its parameters and for
    each of their gradients, beside what the optimizers hold (8 with AdamW) and what the policy does.
    """

    def __init__(
        self, params: NamedParams, build: Callable[[NamedParams], list[Optimizer]], policy: Policy
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
        self.policy = policy
        self.version = 0
        self.rate = 0.0  # of the last update
        self.clocks: dict[int, int] = {}  # the next step of every worker ever known
        self.parted: set[int] = set()  # those that have left, and said so
        self.gone: set[int] = set()  # those that have left without a word
        self.failure = ""  # why nothing can go on, in words

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
        """Start from these values, with workers that hold the same and take `first_step` next."""
        for (_, own), (_, p) in zip(self.params, params, strict=True):
            own.data.copy_(p.detach())
        self.clocks = dict.fromkeys(workers, first_step)
        self.policy.begin(self, first_step)
        for worker in self.gone | self.parted:
            self.policy.lost(self, worker)

    def join(self, worker: int) -> None:
        """A worker has come, or come back. A new one stands where the last of the others does."""
        if worker not in self.clocks and self.active:
            self.clocks[worker] = min(self.clocks[other] for other in self.active)
        self.parted.discard(worker)
        self.gone.discard(worker)

    def leave(self, worker: int, *, parted: bool) -> None:
        """A worker has `parted` from the others, or is gone without a word."""
        (self.parted if parted else self.gone).add(worker)
        self.policy.lost(self, worker)

    def push(self, push: Push) -> bool:
        """Take a push; one that has come before is not taken again. Returns whether it was new."""
        if push.step < self.clocks[push.worker]:
            return False
        self.clocks[push.worker] = push.step + 1
        self.policy.take(self, push)
        return True

    def answers(self, step: int) -> bool:
        """Whether a worker that pushed for `step` can be told what became of it."""
        return self.policy.answers(self, step)

    def ask(self, worker: int, clock: int, norm: float) -> None:
        """The worker wants the parameters after all steps before `clock`; END: after everyone's last.

        `norm` is that of the gradient over all servers; NaN: the worker does not know it.
        """
        if clock == END:
            self.clocks[worker] = END
            self.policy.lost(self, worker)
        else:
            self.policy.settle(self, clock, norm)

    def opens(self, clock: int) -> bool:
        """Whether the parameters contain what is needed of every worker's steps before `clock`."""
        return not self.active if clock == END else self.policy.opens(self, clock)

    def read(self, worker: int, into: Tensor) -> None:
        """Copy the parameters into `into` [n], for the worker to compute with."""
        into.copy_(self.flat)
        self.policy.gave(self, worker)

    def norm(self) -> float:
        """Of `gradient`, as everywhere: the norm of the parameters' norms."""
        return get_total_norm([p.grad for _, p in self.params if p.grad is not None]).item()

    def update(self, rate: float) -> None:
        """Apply `gradient` by the optimizers at this rate."""
        self.rate = rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
