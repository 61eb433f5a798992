"""What replicas that train alone have in common: the parameters agreed on last, bucket by bucket."""

from torch import Tensor

from shoal.buckets import Bucket
from shoal.sync.base import State
from shoal.sync.outer import Outer
from shoal.sync.parameters import read, write


class Shared:
    """The shared parameters of one bucket, and the rule that moves them.

    `mixing` is their share in what a replica goes on with; the rest is what it has reached alone.
    """

    def __init__(self, bucket: Bucket, outer: Outer, mixing: float = 1.0) -> None:
        self.bucket = bucket
        self.outer = outer
        self.mixing = mixing
        self.flat = read(bucket)

    def delta(self) -> Tensor:
        """How far this replica has come: x - y."""
        return self.flat - read(self.bucket)

    def settle(self, mean: Tensor, learning_rate: float) -> None:
        """Move on by the mean delta of all replicas, and have this one follow."""
        if self.outer.pull is not None:
            write(self.bucket, read(self.bucket).add_(self.delta(), alpha=self.outer.pull))
        self.outer.update(self.flat, mean, learning_rate)
        if self.outer.pull is None:
            own = read(self.bucket) if self.mixing < 1 else self.flat
            write(self.bucket, own.lerp(self.flat, self.mixing))

    def state_dict(self) -> State:
        """The shared parameters, and the outer momentum if there is one yet."""
        momentum = self.outer.momentum
        return {"flat": self.flat} | ({} if momentum is None else {"momentum": momentum})

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` gave. A bucket's padding depends on the worker count, and is zero."""
        length = min(len(self.flat), len(state["flat"]))
        self.flat[:length] = state["flat"][:length]
        if "momentum" in state:
            self.outer.momentum = self.flat.new_zeros(self.flat.shape)
            self.outer.momentum[:length] = state["momentum"][:length]
