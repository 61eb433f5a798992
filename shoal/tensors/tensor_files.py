"""Files of tensors, whole or in pieces: any block of a tensor can be read, however it was cut when it was written.

A file is safetensors. Where it holds pieces, its metadata says of which, as JSON:
{"blocks": {name: [shape, [[where a block begins in the piece, where in the whole, its size], ...]]}}.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import UserError
from shoal.tensors.piece import Block

BLOCK = 16 << 20  # bytes of a tensor that are read at once where it need not be whole
ANOTHER = "use another checkpoint"
CODES, SCALE = ".codes", ".scale"  # how the two tensors end that hold one in 8 bits
# By the names that safetensors has for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, ...]
Spec = tuple[torch.dtype, Shape]
Places = dict[str, tuple[Shape, tuple[Block, ...]]]  # parameter -> its whole shape, its piece
_Numbers = tuple[NonNegativeInt, ...]
PLACES = TypeAdapter(dict[str, tuple[_Numbers, list[tuple[_Numbers, _Numbers, _Numbers]]]])


def write(path: Path, tensors: dict[str, Tensor], places: Places) -> None:
    """Write `tensors` by name. What is named as one of `places`, or below it ("parameter/part"), is a piece."""
    found = {name: places.get(name) or places.get(name.rsplit("/", 1)[0]) for name in tensors}
    cut = {
        name: (place[0], [astuple(block) for block in place[1]])
        for name, place in found.items()
        if place and len(place[0]) == tensors[name].dim()
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"blocks": json.dumps(cut)} if cut else {}
    stream(path, specs, lambda name: [tensors[name].detach().cpu()], metadata)


def stream(
    path: Path,
    tensors: Mapping[str, Spec],
    blocks: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write whole tensors of which only a block at a time is in memory: `blocks(name)` gives them in their order.

    As the format has it: the length of the header in 8 bytes, the header as JSON, then the tensors' bytes one after
    the other; the widest elements first, so that all are aligned.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in ordered:
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            for block in blocks(name):
                file.write(as_bytes(block).numpy().data)


def rows(shape: Shape, itemsize: int) -> Iterator[tuple[Shape, Shape]]:
    """Blocks of a few rows each that make up a tensor, about as large as `BLOCK`: where they begin, their size."""
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:]) * itemsize
    count = max(1, BLOCK // max(1, row))
    for first in range(0, shape[0] if row else 0, count):
        yield (first, *(0 for _ in shape[1:])), (min(count, shape[0] - first), *shape[1:])


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, row by row: uint8 [N]."""
    return tensor.reshape(-1).view(torch.uint8)


def check(found: Mapping[str, Spec], wanted: Mapping[str, Spec], asked: str) -> None:
    """Raise UserError, as an answer to `asked`, where there are other tensors than those wanted, or of another shape.

    Floating point of any width can be turned into any other.
    """
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "holds no" if name in wanted else "holds a"
        raise UserError(asked, f"it {what} tensor {name}", "use the model it was saved from")
    for name, (dtype, shape) in wanted.items():
        its, size = found[name]
        if size != shape:
            what = f"{name} has shape {size}, the model's is {shape}"
            raise UserError(asked, what, "use the model it was saved from")
        if its != dtype and not (its.is_floating_point and dtype.is_floating_point):
            raise UserError(asked, f"{name} is {its}, the model's is {dtype}", ANOTHER)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file of tensors to read from. Raises UserError where it is none."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"read {file}", str(error), ANOTHER) from error


@dataclass(frozen=True)
class _Held:
    """A block of the tensor that a file has under some name."""

    file: Path
    block: Block


class Stored:
    """The tensors in the files of a folder. Nothing is read before `read`, and then no more than is asked for.

    Raises UserError where the pieces of a tensor do not make one: if they overlap, leave something out, or disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._blocks: dict[str, list[_Held]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with opened(file) as tensors:
                self._list(file, tensors)
        for name, shape in self.shapes.items():
            if not shape:
                continue  # each rank may have the same number
            blocks = [held.block for held in self._blocks[name] if math.prod(held.block.size)]
            if any(_meet(one, other) for one, other in _neighbours(blocks)):
                raise self._bad(name, "has pieces that overlap")
            if sum(math.prod(block.size) for block in blocks) < math.prod(shape):
                raise self._bad(name, "is not whole: a part of it is in no file")

    def _list(self, file: Path, tensors: Any) -> None:
        try:
            cut = PLACES.validate_json((tensors.metadata() or {}).get("blocks", "{}"))
        except ValidationError as error:
            found = f"its metadata does not say where its pieces belong ({error.errors()[0]['msg']})"
            raise UserError(f"read {file}", found, ANOTHER) from error
        names = list(tensors.keys())
        for name in [*names, *cut.keys() - set(names)]:
            if name not in names:
                raise self._bad(name, f"is named in {file.name}, which does not hold it")
            part = tensors.get_slice(name)
            size, dtype = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
            zero = (0,) * len(size)
            shape, blocks = cut.get(name, (size, [(zero, zero, size)]))
            if dtype is None:
                raise self._bad(name, f"has elements of the unknown kind {part.get_dtype()}")
            if len(shape) != len(size) or not all(_fits(each, size, shape) for each in blocks):
                raise self._bad(name, f"has a piece in {file.name} that lies outside of it")
            if (self.shapes.setdefault(name, shape), self.dtypes.setdefault(name, dtype)) != (shape, dtype):
                raise self._bad(name, f"has pieces of another shape or dtype in {file.name}")
            held = [_Held(file, Block(*each)) for each in blocks]
            self._blocks.setdefault(name, []).extend(held)

    def _bad(self, name: str, found: str) -> UserError:
        return UserError(f"read {self.folder}", f"{name} {found}", ANOTHER)

    @property
    def specs(self) -> dict[str, Spec]:
        """The dtype and the whole shape of every tensor."""
        return {name: (self.dtypes[name], shape) for name, shape in self.shapes.items()}

    def read(
        self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """The block of `name` that begins at `offset`; the whole tensor by default."""
        size = self.shapes[name] if size is None else tuple(size)
        offset = (0,) * len(size) if offset is None else tuple(offset)
        found: Tensor | None = None
        for part, where in self._parts(name, offset, size):
            if part.shape == torch.Size(size):
                return part
            found = part.new_empty(size) if found is None else found
            found[where] = part
        return torch.empty(size, dtype=self.dtypes[name]) if found is None else found

    def piece(self, name: str, blocks: Sequence[Block], size: Sequence[int]) -> Tensor:
        """A piece of `name` of this size, which is these blocks of it."""
        found = [self.read(name, block.offset, block.size) for block in blocks]
        if len(found) == 1:
            return found[0]
        piece = found[0].new_empty(tuple(size))
        for block, part in zip(blocks, found, strict=True):
            piece[block.where] = part
        return piece

    def _parts(self, name: str, offset: Shape, size: Shape) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """What the files hold of a block, and where in the block it belongs."""
        for held in self._blocks[name]:
            block = held.block
            begin = [max(a, b) for a, b in zip(offset, block.offset, strict=True)]
            end = [
                min(a + n, b + m) for a, n, b, m in zip(offset, size, block.offset, block.size, strict=True)
            ]
            if all(a < b for a, b in zip(begin, end, strict=True)) or not size:
                with opened(held.file) as tensors:
                    inner = tuple(
                        slice(a - o + i, b - o + i)
                        for a, b, o, i in zip(begin, end, block.offset, block.at, strict=True)
                    )
                    # A copy, for else the whole file stays mapped; contiguous, for fused optimizers walk over memory.
                    part = tensors.get_slice(name)[inner] if inner else tensors.get_tensor(name)
                    part = part.clone(memory_format=torch.contiguous_format)
                yield part, tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))


def _fits(block: tuple[Shape, Shape, Shape], piece: Shape, whole: Shape) -> bool:
    """Whether a block lies within its piece and within the whole tensor."""
    at, offset, size = block
    return len(at) == len(offset) == len(size) == len(whole) and all(
        a + n <= p and o + n <= w for a, o, n, p, w in zip(at, offset, size, piece, whole, strict=True)
    )


def _meet(one: Block, other: Block) -> bool:
    """Whether the two have an element of the whole in common."""
    dims = zip(one.offset, one.size, other.offset, other.size, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in dims)


def _neighbours(blocks: list[Block]) -> Iterator[tuple[Block, Block]]:
    """The pairs whose rows meet."""
    current: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.offset):
        current = [other for other in current if other.offset[0] + other.size[0] > block.offset[0]]
        yield from ((block, other) for other in current)
        current.append(block)
