"""The guard: watches training that is not the same as synchronous training, and acts before it is lost."""

import math
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.replica import Replica, Step
from shoal.sync.allreduce import AllReduce
from shoal.sync.base import State, Sync
from shoal.sync.parameters import mean, write
from shoal.wire.wire import Wire

MEMORY = 0.9  # of the running mean of the loss
PATIENCE = 10  # steps between two acts: what was changed needs time to show
SYNCHRONOUS, GUARDED, FALLEN_BACK = range(3)


class Guard(Sync):
    """A strategy under guard: synchronous for `guard_steps`, then watched by its loss.

    When the running mean of the loss stands more than `guard` (a share) above the lowest it has reached, or the loss
    is not finite, or the replicas drift further apart than `guard_drift` (a share of their norm), the strategy is
    asked to tighten its agreement; when it cannot any more, all-reduce takes over for good, from the mean of the
    replicas. All ranks see the same loss, and so decide alike; under `async` each what it has heard, and rank 0
    decides.
    """

    def __init__(self, config: RunConfig, wire: Wire, guarded: Sync, say: Callable[[str], None]) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        self.guarded = guarded
        self.replicas_differ = guarded.replicas_differ
        self.all_agree = guarded.all_agree
        self.synchronous = AllReduce(config, wire)
        self.say = say
        self.phase = SYNCHRONOUS if self.options.guard_steps else GUARDED
        self.running = self.lowest = math.inf
        self.quiet = 0  # steps since the last act

    @property
    def acting(self) -> Sync:
        """Who trains now."""
        return self.guarded if self.phase == GUARDED else self.synchronous

    def attach(self, replica: Replica) -> None:
        """Attach who trains first."""
        self.replica = replica
        replica.buckets.on_begin, replica.buckets.on_complete = lambda: None, lambda bucket: None
        self.acting.attach(replica)

    def step(self, replica: Replica, step: Step) -> None:
        """The step of who trains now; after the last synchronous one the guarded strategy begins."""
        self.acting.step(replica, step)
        if self.phase == SYNCHRONOUS and step.number + 1 >= self.options.guard_steps:
            self.phase = GUARDED
            self.attach(replica)
            self.say(
                f"guard: step {step.number + 1}: {self.options.name} begins, at a loss of {self.running:.4g}"
            )

    def watch(self, loss: float) -> None:
        """Act where the loss has risen: tighten, or fall back."""
        self.guarded.watch(loss)
        self.quiet += 1
        if math.isfinite(loss):
            first = math.isinf(self.running)
            self.running = loss if first else MEMORY * self.running + (1 - MEMORY) * loss
            self.lowest = min(self.lowest, self.running)
        if self.phase == GUARDED and self.quiet >= PATIENCE and (because := self._alarm(loss)):
            self._act(because)

    def agree(self, numbers: Tensor) -> Tensor:
        """As who trains now; along with them the mean of the replicas' drift."""
        own = self.replica.island.sum(torch.tensor([self.acting.drift, 1.0], dtype=numbers.dtype))
        told = self.acting.agree(torch.cat([own, numbers]))
        self.drift = (told[0] / told[1]).item()
        return told[2:]

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        """As who trains now."""
        return self.acting.shared_model(replica)

    def finish(self, replica: Replica) -> None:
        """As who trains now."""
        self.acting.finish(replica)

    def wish(self) -> None:
        """As who trains now."""
        self.acting.wish()

    @property
    def hears_wish(self) -> bool:
        """As who trains now."""
        return self.acting.hears_wish

    @property
    def reached(self) -> int:  # type: ignore[override]
        """As who trains now."""
        return self.acting.reached

    @property
    def evaluates_alone(self) -> bool:
        """As who trains now."""
        return self.acting.evaluates_alone

    @property
    def present(self) -> Container[int]:
        """As who trains now."""
        return self.acting.present

    def metrics(self) -> dict[str, float]:
        """Those of who trains now, and which phase that is: 0 synchronous, 1 guarded, 2 fallen back."""
        return self.acting.metrics() | {"sync/guard_phase": self.phase}

    def state_dict(self) -> State:
        """Where the guard stands, and the state of who trains now."""
        numbers = torch.tensor([self.phase, self.running, self.lowest, self.quiet], dtype=torch.float64)
        return {"guard": numbers} | self.acting.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Take up the phase, and hand the rest to who trains in it."""
        before, (phase, self.running, self.lowest, quiet) = self.acting, states[0]["guard"].tolist()
        self.phase, self.quiet = int(phase), int(quiet)
        if self.acting is not before:
            self.attach(self.replica)
        self.acting.load_state_dict(states)

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """Never asked: the guarded strategy's counts."""
        raise NotImplementedError

    def _alarm(self, loss: float) -> str:
        """What is wrong, in words; empty if nothing is."""
        if not math.isfinite(loss) or self.running > self.lowest * (1 + (self.options.guard or 0)):
            return f"the loss is {loss:.4g}, its running mean {self.running:.4g} after {self.lowest:.4g}"
        if self.options.guard_drift is not None and self.drift > self.options.guard_drift:
            return f"the replicas are {self.drift:.3g} of their norm apart"
        return ""

    def _act(self, because: str) -> None:
        self.quiet, self.guarded.drift = 0, 0.0  # the next sync measures it anew
        tightened = self.guarded.tighten()
        if tightened:
            self.say(f"guard: {because}: {tightened}")
        elif tightened is None:
            self.say(f"guard: {because}: all-reduce takes over, from the mean of the replicas")
            self._fall_back()

    def _fall_back(self) -> None:
        """Every replica becomes the mean of all, in parameters and optimizer state."""
        for bucket, flat in zip(self.replica.buckets, mean(self.replica, self.wire), strict=True):
            write(bucket, flat)
        for _, tensor in self.replica.optimizer_state.tensors():
            if tensor.is_floating_point():
                self.wire.sum(tensor).div_(self.wire.world_size)
        self.phase = FALLEN_BACK
        self.attach(self.replica)
