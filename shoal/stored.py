"""Files of tensors, whole or in pieces: any block of a tensor can be read, however it was cut when it was written.

A file is safetensors. Where it holds pieces, its metadata says of which, as JSON:
{"blocks": {name: [shape, [[where a block begins in the piece, where in the whole, its size], ...]]}}.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import UserError
from shoal.piece import Block

Places = dict[str, tuple[tuple[int, ...], tuple[Block, ...]]]  # parameter -> its whole shape, its piece


def write(path: Path, tensors: dict[str, Tensor], places: Places) -> None:
    """Write `tensors` by name. What is named as one of `places`, or below it ("parameter/part"), is a piece."""
    found = {name: places.get(name) or places.get(name.rsplit("/", 1)[0]) for name in tensors}
    cut = {
        name: (place[0], [astuple(block) for block in place[1]])
        for name, place in found.items()
        if place and len(place[0]) == tensors[name].dim()
    }
    metadata = {"format": "pt"} | ({"blocks": json.dumps(cut)} if cut else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


@dataclass(frozen=True)
class _Held:
    """A block of the tensor that a file has under some name."""

    file: Path
    block: Block


class Stored:
    """The tensors in the files of a folder. Nothing is read before `read`, and then no more than is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[_Held]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                cut = json.loads((opened.metadata() or {}).get("blocks", "{}"))
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    size = tuple(opened.get_slice(name).get_shape())
                    zero = (0,) * len(size)
                    shape, blocks = cut.get(name, (size, [(zero, zero, size)]))
                    self.shapes[name] = tuple(shape)
                    held = [_Held(file, Block(*map(tuple, each))) for each in blocks]
                    self._blocks.setdefault(name, []).extend(held)

    def read(
        self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """The block of `name` that begins at `offset`; the whole tensor by default.

        Raises UserError where a part of it is in no file.
        """
        size = self.shapes[name] if size is None else tuple(size)
        offset = (0,) * len(size) if offset is None else tuple(offset)
        found: Tensor | None = None
        filled = 0
        for part, where in self._parts(name, offset, size):
            if part.shape == torch.Size(size):
                return part
            found = part.new_empty(size) if found is None else found
            found[where] = part
            filled += part.numel()
        if found is None or filled < found.numel():
            raise UserError(
                f"read {self.folder}", f"a part of {name} is in no file", "use another checkpoint"
            )
        return found

    def piece(self, name: str, blocks: Sequence[Block], size: Sequence[int]) -> Tensor:
        """A piece of `name` of this size, which is these blocks of it. Raises UserError as `read` does."""
        found = [self.read(name, block.offset, block.size) for block in blocks]
        if len(found) == 1:
            return found[0]
        piece = found[0].new_empty(tuple(size))
        for block, part in zip(blocks, found, strict=True):
            piece[block.where] = part
        return piece

    def _parts(
        self, name: str, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """What the files hold of a block, and where in the block it belongs."""
        for held in self._blocks[name]:
            block = held.block
            begin = [max(a, b) for a, b in zip(offset, block.offset, strict=True)]
            end = [
                min(a + n, b + m) for a, n, b, m in zip(offset, size, block.offset, block.size, strict=True)
            ]
            if all(a < b for a, b in zip(begin, end, strict=True)) or not size:
                with safe_open(held.file, "pt") as opened:
                    inner = tuple(
                        slice(a - o + i, b - o + i)
                        for a, b, o, i in zip(begin, end, block.offset, block.at, strict=True)
                    )
                    part = opened.get_slice(name)[inner] if inner else opened.get_tensor(name)
                yield part, tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))
