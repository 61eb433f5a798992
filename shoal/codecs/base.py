"""What every codec has in common, and three kinds of codecs by how sums are formed of what they encode."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What a codec is made for: a flat tensor that holds parameters of these shapes, sent again and again.

    All random draws follow from `seed`, which is the same on all ranks, or from `seed` and `rank`.
    """

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    rank: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return sum(shape.numel() for shape in self.shapes)


class Codec(ABC):
    """Turns a flat tensor of floats into bytes, and back. Its state belongs to one tensor: make one for each.

    A codec never changes in place a tensor that `state_dict` returned, but puts a new one in its place: whoever
    keeps the state from before a sum can load it again, which undoes the sum (see `shoal.codecs.sums`).
    """

    biased: bool = (
        True  # whether the mean of what it decodes is not the tensor: then the error must be fed back
    )

    def __init__(self, dtype: torch.dtype, *, counts: bool = False) -> None:
        self._dtype = dtype  # float32 or float64: of what is encoded, and of what is decoded
        self._calls = 0  # tensors encoded so far; a subclass counts them, and with `counts` they are saved
        self._saves_calls = counts

    @abstractmethod
    def encode(self, tensor: Tensor) -> Tensor:
        """Float [n] to uint8 [nbytes(n)], in memory of its own. A number that is not finite decodes as not finite."""

    @abstractmethod
    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """Uint8 [nbytes(numel)] to float [numel]. Any codec of the same options and subject can do it."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """The bytes that the next `encode` makes of `numel` elements."""

    def held(self, numel: int) -> int:
        """Bytes of state between two tensors of `numel` elements."""
        return 0

    def state_dict(self) -> State:
        """The state: live tensors."""
        return {"calls": torch.tensor(self._calls)} if self._saves_calls else {}

    def load_state_dict(self, state: State) -> None:
        """Load what `state_dict` returned."""
        self._calls = int(state.get("calls", 0))


class ChunkCodec(Codec):
    """Each rank decodes and sums one chunk of the tensor, and encodes the sum again.

    `encode` and `decode` also take rows: float [..., n] to uint8 [..., nbytes(n)] and back.
    """

    def merge(self, parts: Tensor) -> Tensor:
        """The sum [n] of what each rank sent, decoded: [world_size, n]."""
        return parts.sum(0)


class GatherCodec(Codec):
    """Each rank decodes what all ranks have sent, and adds it up."""

    def add(self, payload: Tensor, total: Tensor) -> None:
        """Add what `payload` decodes to to `total` [n]."""
        total.add_(self.decode(payload, total.numel()))


class LinearCodec(Codec):
    """What is encoded can itself be summed over the ranks, in one round or in several that build on each other."""

    @abstractmethod
    def rounds(self, tensor: Tensor) -> Generator[Tensor, None, Tensor]:
        """Sum `tensor` [n] over the ranks in place. Yields the tensors that the caller must sum, one after the other.

        At the end it returns this rank's contribution [n] to the sum.
        """

    @abstractmethod
    def round_bytes(self, numel: int) -> list[int]:
        """The sizes in bytes of what `rounds` yields for `numel` elements next."""

    def nbytes(self, numel: int) -> int:
        return sum(self.round_bytes(numel))
