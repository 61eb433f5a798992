"""What stands in a stage in the place of the modules that other stages hold, without memory of its own.

A layer hands on what it gets. What comes before the layers gives zeros of the right shape: an embedding looks up rows
of zeros by its family's own code, which knows which of its inputs the indices are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.layouts.cutting import Watched

Place = tuple[nn.Module, str, nn.Module | None]  # a parent, a name in it, and the module for that name


class Left(Exception):
    """Hidden states that have left the last layer of a stage."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _leave(module: nn.Module, args: Any, made: Any) -> None:
    """A hook behind a layer that ends the forward pass with the layer's hidden states."""
    raise Left(made[0] if isinstance(made, tuple) else made)


class Skip(nn.Module):
    """In the place of a layer that is not computed here. It has the attributes that the family's code may read."""

    def __init__(self, layer: nn.Module, made: Any) -> None:
        super().__init__()
        vars(self).update(_plain(layer))
        self._more = len(made) - 1 if isinstance(made, tuple) else None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they came, in the form in which the layer returns them."""
        return hidden if self._more is None else (hidden, *[None] * self._more)


class Zeros(nn.Module):
    """In the place of a module other than an embedding that comes before the layers of another stage."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros [..., width] for rows [..., any], or for indices [...]."""
        rows = given.shape[:-1] if given.is_floating_point() else given.shape
        return torch.zeros(*rows, self.width, dtype=self.dtype, device=given.device)


def before(seen: Watched) -> dict[nn.Module, nn.Module]:
    """The stubs of what computes before the layers."""
    dtype = seen.entered[0].dtype
    return {
        module: _empty(module, dtype)
        if isinstance(module, nn.Embedding)
        else Zeros(seen.widths.get(module, 0), dtype)
        for module in seen.before
    }


def skips(seen: Watched) -> list[Skip]:
    """The stub of every layer."""
    return [Skip(layer, made) for layer, made in zip(seen.layers, seen.left, strict=True)]


def in_places(model: nn.Module, stubs: Mapping[nn.Module, nn.Module]) -> list[Place]:
    """Wherever one of these modules stands in the model: its parent, its name there, and its stub."""
    return [
        (parent, name, stubs[child])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in stubs
    ]


def put(places: Sequence[Place]) -> None:
    """Put each module in its place."""
    for parent, name, module in places:
        parent._modules[name] = module


def view(layers: Sequence[nn.Module], skips: Sequence[Skip], own: range) -> dict[str, nn.Module]:
    """What a list of layers holds while only the layers `own` compute."""
    return {str(index): layers[index] if index in own else skip for index, skip in enumerate(skips)}


@contextmanager
def stage(
    layers: nn.ModuleList,
    own: range,
    listed: dict[str, nn.Module],
    places: Sequence[Place],
    entry: Callable[[nn.Module, Any], Any] | None,
) -> Iterator[None]:
    """Within it the model is the stage of the layers `own`: its list holds `listed`, and stubs stand in `places`.

    `entry` replaces what comes before the first of these layers. Behind the last one, unless it is the model's last,
    the forward pass ends in `Left`.
    """
    hooks = []
    # In front of what other layouts do before a layer; behind what they do after one.
    if entry is not None:
        hooks.append(layers[own.start].register_forward_pre_hook(entry, prepend=True))
    if own.stop < len(layers):
        hooks.append(layers[own.stop - 1].register_forward_hook(_leave))
    before = [(parent, name, parent._modules[name]) for parent, name, _ in places]
    whole, layers._modules = layers._modules, listed
    put(places)
    try:
        yield
    finally:
        layers._modules = whole
        put(before)
        for hook in hooks:
            hook.remove()


def _empty(embedding: nn.Embedding, dtype: torch.dtype) -> nn.Module:
    """An embedding of the same class whose rows are one row of zeros."""
    stub = nn.Module.__new__(type(embedding))
    nn.Module.__init__(stub)
    vars(stub).update(_plain(embedding))
    for name, buffer in embedding.named_buffers(recurse=False):
        stub.register_buffer(name, buffer, persistent=False)
    row = torch.zeros(1, embedding.embedding_dim, dtype=dtype, device=embedding.weight.device)
    vars(stub)["weight"] = row.expand(embedding.num_embeddings, -1)
    return stub.train(embedding.training)


def _plain(module: nn.Module) -> dict[str, Any]:
    """What a module has beside its tensors and modules."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if name != "forward"}
