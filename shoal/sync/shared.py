"""The parameters that replicas which train alone have agreed on last, bucket by bucket."""

from torch import Tensor

from shoal.errors import UserError
from shoal.sync.base import State
from shoal.sync.outer import Outer
from shoal.sync.parameters import read, write
from shoal.tensors.buckets import Bucket


class Shared:
    """The shared parameters of one bucket, and the rule that moves them.

    After a sync a replica continues with `mixing` times them, and 1 - `mixing` times its own parameters.
    """

    def __init__(self, bucket: Bucket, outer: Outer, mixing: float = 1.0) -> None:
        self.bucket = bucket
        self.outer = outer
        self.mixing = mixing
        self.flat = read(bucket)

    def delta(self) -> Tensor:
        """How far this replica has moved away: x - y."""
        return self.flat - read(self.bucket)

    def outer_step(self, mean: Tensor, learning_rate: float) -> None:
        """Move the shared parameters by the `mean` delta of all replicas, and this replica with them."""
        if self.outer.pull is not None:
            write(self.bucket, read(self.bucket).add_(self.delta(), alpha=self.outer.pull))
        self.outer.update(self.flat, mean, learning_rate)
        if self.outer.pull is None:
            own = read(self.bucket) if self.mixing < 1 else self.flat
            write(self.bucket, own.lerp(self.flat, self.mixing))

    @property
    def numel(self) -> int:
        """Elements without the padding, which depends on the worker count."""
        return sum(shape.numel() for shape in self.bucket.shapes)

    def padded(self, tensor: Tensor) -> Tensor:
        """A saved buffer [numel] as one of this bucket. Raises UserError if it is that of another bucket."""
        if len(tensor) != self.numel:
            found = f"a bucket held {len(tensor):,} elements then, and {self.numel:,} now"
            raise UserError("--resume-from-checkpoint", found, "give the same --bucket-mb and --fragments")
        padded = self.flat.new_zeros(self.flat.shape)
        padded[: self.numel] = tensor
        return padded

    def state_dict(self) -> State:
        """The shared parameters, and the outer momentum if there is one yet."""
        momentum = self.outer.momentum
        held = {"flat": self.flat} | ({} if momentum is None else {"momentum": momentum})
        return {name: tensor[: self.numel] for name, tensor in held.items()}

    def load_state_dict(self, state: State) -> None:
        """Load what `state_dict` returned. Raises UserError where the buckets are cut differently."""
        self.flat = self.padded(state["flat"])
        if "momentum" in state:
            self.outer.momentum = self.padded(state["momentum"])
