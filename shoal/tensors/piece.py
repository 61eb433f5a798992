"""What one rank holds of each parameter. Outside the layouts, a replica is these pieces and no more."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Block:
    """Values that lie together in a piece and in the whole: they begin `at` in the piece, `offset` in the whole."""

    at: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def where(self) -> tuple[slice, ...]:
        """The block in the piece."""
        return tuple(slice(begin, begin + n) for begin, n in zip(self.at, self.size, strict=True))

    def along_last(self, of_each: int) -> "Block":
        """This block of a tensor that has one number for every `of_each` along the last dim."""
        at, offset, size = ((*dims[:-1], dims[-1] // of_each) for dims in (self.at, self.offset, self.size))
        return Block(at, offset, size)

    def rows(self, first: int, stop: int) -> "Block":
        """The part in rows `first` to `stop` of the piece, as a block of a piece of these rows."""
        begin, end = max(self.at[0], first), min(self.at[0] + self.size[0], stop)
        return Block(
            (begin - first, *self.at[1:]),
            (self.offset[0] + begin - self.at[0], *self.offset[1:]),
            (max(0, end - begin), *self.size[1:]),
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of the parameter `name` of the whole model: a block, which begins at `offset` in its `shape`.

    Where it is several blocks of the whole (of a matrix of queries, keys and values), `parts` are these.
    `local` holds the values, in the memory of the model's own `source`, to which gradients come. Where these are
    tensors of another kind, `unwrap` gives the plain tensor of a gradient, and `wrap` undoes it.
    """

    name: str
    shape: torch.Size
    offset: tuple[int, ...]
    local: nn.Parameter
    source: nn.Parameter
    unwrap: Callable[[Tensor], Tensor] = _itself
    wrap: Callable[[Tensor], Tensor] = _itself
    parts: tuple[Block, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the whole that it holds."""
        return self.parts or (Block((0,) * self.local.dim(), self.offset, tuple(self.local.shape)),)

    def place(self, held: torch.Size) -> tuple[tuple[int, ...], tuple[Block, ...]]:
        """The whole's shape and the blocks of a tensor of shape `held`, coarser than the piece along the last dim.

        The factor has to divide the size and the offset of each block in that dim.
        """
        of_each = self.local.shape[-1] // held[-1]
        shape = (*self.shape[:-1], self.shape[-1] // of_each)
        return shape, tuple(block.along_last(of_each) for block in self.blocks)


def whole(model: nn.Module) -> list[Piece]:
    """Every parameter once, tied ones under their first name, as the one piece of itself."""
    return [Piece(name, p.shape, (0,) * p.dim(), p, p) for name, p in model.named_parameters()]


def take_wide_gradients(pieces: Iterable[Piece]) -> None:
    """Give trained pieces gradients in at least float32, whatever the dtype of their values."""
    for piece in pieces:
        for p in (piece.source, piece.local):
            if p.requires_grad:
                p.grad_dtype = torch.promote_types(p.dtype, torch.float32)


def trained(pieces: list[Piece]) -> list[Piece]:
    """Those of `pieces` that gradients come to on this rank."""
    return [piece for piece in pieces if piece.source.requires_grad and piece.local.numel()]


def named(pieces: Iterable[Piece]) -> list[tuple[str, nn.Parameter]]:
    """What is held of each parameter, with its name."""
    return [(piece.name, piece.local) for piece in pieces]


def empty(piece: Piece, source: nn.Parameter | None = None) -> Piece:
    """The empty piece of a parameter that other ranks train; `source` is the copy in this rank's model, if any."""
    local = nn.Parameter(piece.local.detach()[:0].clone(), requires_grad=piece.source.requires_grad)
    return replace(piece, local=local, source=local if source is None else source, parts=())
