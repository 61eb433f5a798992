"""The tensors that `save_pretrained` writes of a model, each as a part of those that the model has in memory.

transformers holds the experts of a layer as one tensor, and writes the tensors of each expert, as other programs read
them. How it does that is asked of its own code, which is run on tensors without values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from shoal.tensors import tensor_files
from shoal.tensors.tensor_files import Shape, Stored

Blocks = Iterator[tuple[tuple[Shape, Shape], Tensor]]  # where each begins, its size; its values


@dataclass(frozen=True)
class Box:
    """A block of a tensor in memory, perhaps with its dims in another order.

    Dim i of what is written is dim `order[i]` of the tensor in memory; None: it has size 1, and is none of them.
    """

    source: str
    offset: Shape
    size: Shape
    order: tuple[int | None, ...]

    def blocks(self, weights: Stored, shape: Shape) -> Blocks:
        """What is written, a few rows at a time."""
        kept = [dim for dim in self.order if dim is not None]
        single = [dim for dim in range(len(self.size)) if dim not in kept]
        for where in tensor_files.rows(shape, weights.dtypes[self.source].itemsize):
            begin, size = list(self.offset), list(self.size)
            for dim, first, count in zip(self.order, *where, strict=True):
                if dim is not None:
                    begin[dim], size[dim] = self.offset[dim] + first, count
            yield where, weights.read(self.source, begin, size).permute([*single, *kept]).reshape(where[1])


@dataclass(frozen=True)
class Written:
    """The tensors of a model as they are written, by their names in the files, in their order there."""

    model: PreTrainedModel
    held: Mapping[str, Tensor]  # in memory, without values
    shapes: Mapping[str, Shape]
    sources: Mapping[str, frozenset[str]]  # of which tensors in memory each is made
    boxes: Mapping[str, Box]  # of those that are a block of one

    @classmethod
    def of(cls, model: PreTrainedModel, held: Mapping[str, Tensor]) -> "Written":
        """As `save_pretrained` would write the tensors of a model on the meta device."""
        held = {name: tensor.detach() for name, tensor in held.items()}
        with _Followed(held) as followed:
            made = revert_weight_conversion(model, {**held})
        boxes = {name: _box(held, tensor, followed.sources(tensor)) for name, tensor in made.items()}
        return cls(
            model,
            held,
            {name: tuple(tensor.shape) for name, tensor in made.items()},
            {name: followed.sources(tensor) for name, tensor in made.items()},
            {name: box for name, box in boxes.items() if box is not None},
        )

    def blocks(self, name: str, weights: Stored) -> Blocks:
        """A tensor's values from the files of those in memory.

        A block of one of those is read a few rows at a time. What is joined of several, or has their elements in
        another order, costs the memory of all its sources.
        """
        if name in self.boxes:
            yield from self.boxes[name].blocks(weights, self.shapes[name])
            return
        values = {source: weights.read(source) for source in self.sources[name]}
        whole = revert_weight_conversion(self.model, {**self.held, **values})[name]
        yield ((0,) * whole.dim(), tuple(whole.shape)), whole


class _Followed(TorchFunctionMode):
    """Records which tensors each tensor is made of. `contiguous` copies none: a part of a tensor stays a view."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._made = {id(tensor): (tensor, frozenset([name])) for name, tensor in held.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        made = args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
        given = [self.sources(tensor) for tensor in _tensors([args, kwargs])]
        for tensor in _tensors(made):
            self._made[id(tensor)] = (tensor, frozenset().union(*given))
        return made

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """The names of those it is made of."""
        return self._made[id(tensor)][1] if id(tensor) in self._made else frozenset()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _box(held: Mapping[str, Tensor], made: Tensor, sources: frozenset[str]) -> Box | None:
    """The block that `made` is a view of, by its strides; None where it is no block."""
    name = next(iter(sources), None)
    if name is None or len(sources) > 1 or (made is not held[name] and made._base is not held[name]):
        return None
    whole, left = held[name], made.storage_offset()
    offset, size = [], [1] * whole.dim()
    for stride in whole.stride():
        offset.append(left // stride)
        left %= stride
    order: list[int | None] = []
    for count, stride in zip(made.shape, made.stride(), strict=True):
        like = [dim for dim in range(whole.dim()) if whole.stride(dim) == stride and whole.shape[dim] > 1]
        if count > 1 and (not like or like[0] in order):
            return None
        order.append(like[0] if count > 1 else None)
        if count > 1:
            size[like[0]] = count
    inside = all(a + n <= m for a, n, m in zip(offset, size, whole.shape, strict=True))
    return Box(name, tuple(offset), tuple(size), tuple(order)) if inside else None
