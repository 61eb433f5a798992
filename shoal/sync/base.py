"""What every strategy has in common. Most override `attach` and `step` only."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from shoal.config import RunConfig
from shoal.replica import Replica, Step
from shoal.sync.members import Members
from shoal.wire.wire import Wire

State = dict[str, Tensor]


class Changed(Sequence[State]):
    """The states of all ranks, each read only when it is asked for, and changed then."""

    def __init__(self, states: Sequence[State], change: Callable[[State], State]) -> None:
        self._states = states
        self._change = change

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, rank: Any) -> Any:
        return self._change(self._states[rank])


def mean_of(states: Sequence[State]) -> State:
    """The mean over the ranks of each floating-point tensor, of others the first rank's. Reads each state once."""
    total: State = {}
    for state in states:
        for name, tensor in state.items():
            if name not in total:
                total[name] = tensor.clone()
            elif tensor.is_floating_point():
                total[name] += tensor
    return {n: t.div_(len(states)) if t.is_floating_point() else t for n, t in total.items()}


class Sync(ABC):
    """How one replica agrees with the others. A strategy performs the update, since some update elsewhere."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        self._wire = wire
        self.members = Members(wire)

    @abstractmethod
    def attach(self, replica: Replica) -> None:
        """Prepare for the first step: listen to the replica's buckets, take copies. Called once, before it."""

    @abstractmethod
    def step(self, replica: Replica, step: Step) -> None:
        """Exchange what the strategy exchanges, and update the replica. Called after the gradients of `step`."""

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        """Within it the replica holds the one model of all: the one that is evaluated and saved."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """The strategy's metrics of the last step, by name."""
        return {}

    def state_dict(self) -> State:
        """The live tensors of this rank that a checkpoint must hold beside the replica."""
        return {}

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Load what `state_dict` returned on every rank, in their order. Their number may differ from today's."""
        assert not any(states), (
            f"{type(self).__name__} has no state, but a checkpoint holds {states[0].keys()}"
        )


class Guardable:
    """What a guard asks of the strategy that it watches. Of others it watches the loss alone."""

    drift = 0.0  # how far this replica was from those it last met, as a part of the norm of its parameters

    def tighten(self) -> str | None:
        """Agree more closely from now on; returns what was changed, in words. Empty: it is as close as it can be.

        None: all-reduce is closer.
        """
        return None
