"""What every strategy has in common. Most need `attach`, `step` and `cost` only."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.replica import Replica, Step
from shoal.wire.wire import Wire

State = dict[str, Tensor]


class Changed(Sequence[State]):
    """The states of all ranks, each changed when it is read, and not read before."""

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
    """How one replica agrees with the others. It owns the update, since some strategies update elsewhere."""

    reached = 0  # where ranks stop that do not wait for each other: the steps that the foremost has taken
    all_agree = True  # whether `agree` tells every rank the same
    replicas_differ = False  # whether they may, after a step, in parameters or optimizer state
    drift = 0.0  # how far this replica was from those it last met, as a part of the norm of its parameters

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        self.wire = wire

    @abstractmethod
    def attach(self, replica: Replica) -> None:
        """Once, before the first step: listen to the replica's buckets, take copies."""

    @abstractmethod
    def step(self, replica: Replica, step: Step) -> None:
        """After the gradients of `step`: exchange what the strategy exchanges, and update the replica."""

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks of what the loop tells of a step; of the ranks heard of, without a barrier.

        The last number of a step is positive where this rank wishes to stop. Where ranks do not wait for each other,
        it comes back as whether this rank stops after this step.
        """
        return self.wire.sum(numbers)

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        """Within it the replica holds the one model of all: the one that is evaluated and saved."""
        return nullcontext()

    def finish(self, replica: Replica) -> None:
        """After the last step that this rank takes, which need not be the others' last: part from them."""
        return

    def wish(self) -> None:
        """Tell the ranks that will not ask that this one wishes to stop. May run in a signal handler."""
        return

    @property
    def hears_wish(self) -> bool:
        """Whether this rank already knows that another one wishes to stop."""
        return False

    @property
    def evaluates_alone(self) -> bool:
        """Whether rank 0 evaluates while the others go on: where nobody may wait for somebody who may be gone."""
        return False

    @property
    def present(self) -> Container[int]:
        """The ranks that still take part."""
        return range(self.wire.world_size)

    def watch(self, loss: float) -> None:
        """Told the loss a label of each step, once all ranks know it."""
        return

    def tighten(self) -> str | None:
        """Agree more closely from now on; says in words what was changed. Empty: it is as close as it can be.

        None: all-reduce is closer.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """What the strategy has to tell of the last step, by metric name."""
        return {}

    def state_dict(self) -> State:
        """The live tensors of this rank that a checkpoint must hold beside the replica."""
        return {}

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Take back what `state_dict` gave on every rank, in their order. Their number may differ from today's."""
        assert not any(states), f"{type(self).__name__} keeps nothing, and was given {states[0].keys()}"

    @classmethod
    @abstractmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """What it sends and holds, and how stale it may be."""
