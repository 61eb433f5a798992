"""Sync: when and how replicas agree. A strategy is one file here and one line in `SYNCS`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from shoal.collectives import Wire
from shoal.config import RunConfig
from shoal.replica import Replica
from shoal.sync.allreduce import AllReduce


class Sync(Protocol):
    """How one replica agrees with the others. It owns the update, since some strategies update elsewhere."""

    def attach(self, replica: Replica) -> None:
        """Once, before the first step: listen to the replica's buckets, take copies."""
        ...

    def step(self, replica: Replica, step: int) -> None:
        """After the gradients of `step`: exchange what the strategy exchanges, and update the replica."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the replica."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        ...


SYNCS: dict[str, Callable[[RunConfig, Wire], Sync]] = {"allreduce": AllReduce.from_config}
