"""What every codec has in common."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What a codec is made for: a flat tensor that holds parameters of these shapes, sent again and again.

    Whatever is drawn at random follows from `seed`, the same on all ranks, or from `seed` and `rank`.
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
    """Turns a flat tensor of floats into bytes, and back. What it remembers belongs to one tensor: make one for each.

    `combine` says how a sum over the ranks is formed of what it encodes (see `shoal.codecs.sums`):

    - "dense": not encoded at all;
    - "chunks": every rank decodes and sums one chunk, and encodes the sum again. `encode` and `decode` then also take
      rows: float [..., n] to uint8 [..., nbytes(n)] and back;
    - "gather": every rank decodes what all have sent, and adds it up;
    - "linear": what is encoded can be added up as it is, in one round or in several that build on each other.

    A codec is `biased` if what it decodes is not the tensor on average: then the error must be fed back.
    """

    combine: Literal["dense", "chunks", "gather", "linear"]
    biased: bool = True
    ramps: ClassVar[bool] = False  # whether it takes `codec_warmup` itself; else nothing is encoded meanwhile

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # float32 or float64: of what is encoded, and of what is decoded

    @abstractmethod
    def encode(self, tensor: Tensor) -> Tensor:
        """Float [n] to uint8 [nbytes(n)], in memory of its own. What is not finite stays visible."""

    @abstractmethod
    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """Uint8 [nbytes(numel)] to float [numel]. Any codec of the same options and subject can do it."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """The size of what `encode` makes of `numel` elements next."""

    def merge(self, parts: Tensor) -> Tensor:
        """("chunks") The sum [n] of what each rank sent, decoded: [world_size, n]."""
        return parts.sum(0)

    def add(self, payload: Tensor, total: Tensor) -> None:
        """("gather") Add what `payload` stands for to `total` [n]."""
        total.add_(self.decode(payload, total.numel()))

    def rounds(self, tensor: Tensor) -> Generator[Tensor, None, Tensor]:
        """("linear") Sum `tensor` [n] over the ranks, in place: yields, in turn, what they are to sum in place.

        At the end it returns the part [n] of the sum that is this rank's.
        """
        raise NotImplementedError

    def round_bytes(self, numel: int) -> list[int]:
        """("linear") The sizes of what `rounds` yields for `numel` elements next."""
        raise NotImplementedError

    def held(self, numel: int) -> int:
        """Bytes that it remembers between two tensors of `numel` elements."""
        return 0

    def state_dict(self) -> State:
        """What it remembers: live tensors."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027  (most remember nothing)
        """Take back what `state_dict` gave."""
