"""The guard: watches training that differs from synchronous training, and acts before it diverges for good."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.replica import Replica, Step
from shoal.sync.allreduce import AllReduce
from shoal.sync.base import Guardable, State, Sync
from shoal.sync.members import Members
from shoal.sync.parameters import mean, write
from shoal.wire.wire import Wire

MEMORY = 0.9  # of the running mean of the loss
PATIENCE = 10  # steps between two acts: what was changed needs time to show
SYNCHRONOUS, GUARDED, FALLEN_BACK = range(3)


class Guard(Sync):
    """A strategy under guard: synchronous for `guard_steps`, then its own, watched by the loss.

    When the running mean of the loss is more than `guard` (a fraction) above its lowest value so far, or the loss is
    not finite, or the replicas are further apart than `guard_drift` (a fraction of their norm), the strategy is asked
    to tighten its agreement. When it cannot, all-reduce takes over for good, from the mean of the replicas. All ranks
    know the same loss, and so decide alike; where they do not wait for each other, rank 0 decides.
    """

    def __init__(self, config: RunConfig, wire: Wire, guarded: Sync, say: Callable[[str], None]) -> None:
        self._wire = wire
        self.options = config.strategy
        self.guarded = guarded
        self.guardable = guarded if isinstance(guarded, Guardable) else Guardable()
        self.synchronous = AllReduce(config, wire)
        # Shares that follow the speed of the ranks in one phase would be left as they are in the next.
        self.synchronous.members.all_agree = guarded.members.all_agree
        for each in (self.synchronous, guarded):
            each.members.carry(self._own_drift, self._note_drift)
        self.drift = 0.0  # the mean over the replicas
        self.say = say
        self.phase = SYNCHRONOUS if self.options.guard_steps else GUARDED
        self.running = self.lowest = math.inf
        self.quiet = 0  # steps since the last act

    @property
    def acting(self) -> Sync:
        """The strategy of this phase."""
        return self.guarded if self.phase == GUARDED else self.synchronous

    @property
    def members(self) -> Members:  # type: ignore[override]
        """Those of the strategy of this phase."""
        return self.acting.members

    def attach(self, replica: Replica) -> None:
        self.replica = replica
        replica.buckets.listen()
        self.acting.attach(replica)

    def step(self, replica: Replica, step: Step) -> None:
        self.acting.step(replica, step)
        if self.phase == SYNCHRONOUS and step.number + 1 >= self.options.guard_steps:
            self.phase = GUARDED
            self.attach(replica)
            self.say(
                f"guard: step {step.number + 1}: {self.options.name} begins, at a loss of {self.running:.4g}"
            )

    def watch(self, loss: float) -> None:
        """Act where the loss a label of the last step, which all ranks know, has risen: tighten, or fall back."""
        self.quiet += 1
        if math.isfinite(loss):
            first = math.isinf(self.running)
            self.running = loss if first else MEMORY * self.running + (1 - MEMORY) * loss
            self.lowest = min(self.lowest, self.running)
        if self.phase == GUARDED and self.quiet >= PATIENCE and (because := self._alarm(loss)):
            self._act(because)

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        return self.acting.shared_model(replica)

    def metrics(self) -> dict[str, float]:
        # The phase: 0 synchronous, 1 guarded, 2 fallen back.
        return self.acting.metrics() | {"sync/guard_phase": self.phase}

    def state_dict(self) -> State:
        numbers = torch.tensor([self.phase, self.running, self.lowest, self.quiet], dtype=torch.float64)
        return {"guard": numbers} | self.acting.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        before, (phase, self.running, self.lowest, quiet) = self.acting, states[0]["guard"].tolist()
        self.phase, self.quiet = int(phase), int(quiet)
        if self.acting is not before:
            self.attach(self.replica)
        self.acting.load_state_dict(states)

    def _own_drift(self) -> Tensor:
        drift = self.guardable.drift if self.phase == GUARDED else 0.0
        return self.replica.sum(torch.tensor([drift, 1.0], dtype=torch.float64))

    def _note_drift(self, sums: Tensor) -> None:
        self.drift = (sums[0] / sums[1]).item()

    def _alarm(self, loss: float) -> str:
        """What is wrong, in words; empty if nothing is."""
        if not math.isfinite(loss) or self.running > self.lowest * (1 + (self.options.guard or 0)):
            return f"the loss is {loss:.4g}, its running mean {self.running:.4g} after {self.lowest:.4g}"
        if self.options.guard_drift is not None and self.drift > self.options.guard_drift:
            return f"the replicas are {self.drift:.3g} of their norm apart"
        return ""

    def _act(self, because: str) -> None:
        self.quiet, self.guardable.drift = 0, 0.0  # the next sync measures it anew
        tightened = self.guardable.tighten()
        if tightened:
            self.say(f"guard: {because}: {tightened}")
        elif tightened is None:
            self.say(f"guard: {because}: all-reduce takes over, from the mean of the replicas")
            self._fall_back()

    def _fall_back(self) -> None:
        """Every replica becomes the mean of all, in parameters and optimizer state."""
        for bucket, flat in zip(self.replica.buckets, mean(self.replica, self._wire), strict=True):
            write(bucket, flat)
        for _, tensor in self.replica.optimizer_state.tensors():
            if tensor.is_floating_point():
                self._wire.sum(tensor).div_(self._wire.world_size)
        self.phase = FALLEN_BACK
        self.attach(self.replica)
