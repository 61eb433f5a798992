"""Files of tensors, whole or in pieces: any block of a tensor can be read, however it was cut when it was written.

A file is safetensors. Where it holds pieces, its metadata says of which: {"pieces": {name: [shape, offset]}} as JSON.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import UserError

Places = dict[
    str, tuple[tuple[int, ...], tuple[int, ...]]
]  # parameter -> its whole shape, where its piece begins


def write(path: Path, tensors: dict[str, Tensor], places: Places) -> None:
    """Write `tensors` by name. What is named as one of `places`, or below it ("parameter/part"), is a piece."""
    found = {name: places.get(name) or places.get(name.rsplit("/", 1)[0]) for name in tensors}
    cut = {name: place for name, place in found.items() if place and len(place[0]) == tensors[name].dim()}
    metadata = {"format": "pt"} | ({"pieces": json.dumps(cut)} if cut else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


@dataclass(frozen=True)
class Block:
    """One piece in a file: where it begins in the whole tensor, and its size."""

    file: Path
    offset: tuple[int, ...]
    size: tuple[int, ...]


class Stored:
    """The tensors in the files of a folder. Nothing is read before `read`, and then no more than is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[Block]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                cut = json.loads((opened.metadata() or {}).get("pieces", "{}"))
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    size = tuple(opened.get_slice(name).get_shape())
                    shape, offset = cut.get(name, (size, (0,) * len(size)))
                    self.shapes[name] = tuple(shape)
                    self._blocks.setdefault(name, []).append(Block(file, tuple(offset), size))

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

    def _parts(
        self, name: str, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """What the files hold of a block, and where in the block it belongs."""
        for block in self._blocks[name]:
            begin = [max(a, b) for a, b in zip(offset, block.offset, strict=True)]
            end = [
                min(a + n, b + m) for a, n, b, m in zip(offset, size, block.offset, block.size, strict=True)
            ]
            if all(a < b for a, b in zip(begin, end, strict=True)) or not size:
                with safe_open(block.file, "pt") as opened:
                    inner = tuple(
                        slice(a - o, b - o) for a, b, o in zip(begin, end, block.offset, strict=True)
                    )
                    part = opened.get_slice(name)[inner] if inner else opened.get_tensor(name)
                yield part, tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))
