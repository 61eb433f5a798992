"""What stands in a stage in the place of the modules that other stages hold, and takes no memory.

A layer hands on what it gets. What comes before the layers gives zeros of the right shape: an embedding looks up rows
of zeros by its family's own code, which knows which of its inputs the indices are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.layouts.cutting import Watched

Place = tuple[nn.Module, str, nn.Module | None]  # a parent, a name in it, and what is to be there


class Left(Exception):
    """Hidden states that have left the last layer of a stage."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def leave(module: nn.Module, args: Any, made: Any) -> None:
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
