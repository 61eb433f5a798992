"""The layers of a model, which all that works layer by layer takes one at a time."""

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model: the members of its outermost module lists."""
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield from blocks(child)
        elif any(isinstance(layer, nn.ModuleList | nn.ModuleDict) for layer in child):
            yield from blocks(child)  # no layers yet: lists of them
        else:
            yield from child
