"""The layers of a model, for code that works layer by layer."""

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model: the members of its outermost module lists."""
    for layers in stacks(model):
        yield from layers


def stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost module lists, which are not empty: of a decoder one, of an encoder and a decoder two."""
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield from stacks(child)
        elif any(isinstance(layer, nn.ModuleList | nn.ModuleDict) for layer in child):
            yield from stacks(child)  # no layers yet: lists of them
        elif len(child):
            yield child
