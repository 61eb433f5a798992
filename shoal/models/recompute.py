"""Activation checkpointing: a layer keeps its inputs alone, and computes the rest again in its backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". With n layers that each keep a bytes of activations
and take inputs of x bytes, a backward pass holds of them

- none       n a
- full       n x + a, for n forward passes of a layer more
- selective  n / 2 (a + x) + a, for half as many: every other layer, the first one included
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from shoal.errors import UserError
from shoal.models.blocks import blocks

Surroundings = Callable[[], AbstractContextManager[object]]


def recompute(model: nn.Module, which: str, again: Surroundings | None = None) -> None:
    """Compute layers of `model` again in backward passes: "none", "full" or "selective".

    Masks of dropout are drawn as they were, so neither loss nor gradient changes by a bit; names stay. `again` is
    asked as a layer computes, for what is to be around it the second time. Raises UserError where the model has no
    layers.
    """
    if which == "none":
        return
    layers = list(blocks(model))
    if not layers:
        found = f"{type(model).__name__} has no list of layers to compute one by one"
        raise UserError(f"--gradient-checkpointing {which}", found, "leave it out, or take another model")
    around = noop_context_fn if again is None else lambda: (nullcontext(), again())
    chosen = layers[:: 1 if which == "full" else 2]
    for layer in (each for each in chosen if any(True for _ in each.parameters())):
        # In the place of the method, not around the module: a module around it would be in every name, and what
        # gathers the layer's parameters around the module does so around both passes.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=True, context_fn=around
        )
