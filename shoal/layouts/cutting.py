"""Where a model can be cut into stages: what computes before its layers and after them, and which layers go together.

Nothing of a model's family is known here: one tiny forward pass is watched.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.models.blocks import blocks


class NoStages(ShoalError):
    """Why a model cannot be cut into stages."""


def balance(layers: Sequence[float], before: float, after: float, stages: int) -> list[range]:
    """Cut layers of these costs into contiguous stages, none empty, so that the largest is as small as can be.

    What comes `before` the layers is part of the first stage, what comes `after` them of the last. Of equally good
    cuts it takes the one whose stages have the smallest sum of squares.
    """
    count = len(layers)
    until = [0.0, *itertools.accumulate(layers)]

    def cost(first: int, stop: int) -> float:
        ends = (before if first == 0 else 0) + (after if stop == count else 0)
        return until[stop] - until[first] + ends

    def best(join: Callable[[float, float], float]) -> tuple[float, list[int]]:
        """By dynamic programming over where the last stage begins: the joined costs, and the stages' first layers."""
        found = {stop: (join(0.0, cost(0, stop)), [0]) for stop in range(1, count + 1)}
        for stage in range(1, stages):
            found = {
                stop: min(
                    (join(found[first][0], cost(first, stop)), [*found[first][1], first])
                    for first in range(stage, stop)
                )
                for stop in range(stage + 1, count + 1)
            }
        return found[count]

    largest, _ = best(max)
    _, firsts = best(lambda joined, own: joined + (own**2 if own <= largest else float("inf")))
    return [range(first, stop) for first, stop in zip(firsts, [*firsts[1:], count], strict=True)]


@dataclass
class Watched:
    """What one forward pass of training has shown of a model."""

    layers: nn.ModuleList
    before: list[nn.Module] = field(default_factory=list)  # have parameters of their own, and are no layers
    after: list[nn.Module] = field(default_factory=list)
    widths: dict[nn.Module, int] = field(default_factory=dict)  # of what these make
    entered: list[Tensor] = field(default_factory=list)  # each layer
    left: list[Any] = field(default_factory=list)
    draws: bool = False  # random numbers, for dropout
    costs: tuple[list[float], float, float] = ([], 0, 0)  # of each layer, of what comes before and after


@torch.no_grad()
def watch(model: nn.Module, autocast: AbstractContextManager[object], generator: torch.Generator) -> Watched:
    """See how `model` computes. Raises NoStages where its stages would compute otherwise."""
    found = list(blocks(model))
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and [*each] == found]
    if not found or not lists:
        raise NoStages("its layers are not one list")
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        raise NoStages("it leaves out layers at random (layerdrop)")
    seen = Watched(lists[0])
    below = {module for layer in found for module in layer.modules()}
    outside = [
        m for m in model.modules() if m not in below and any(True for _ in m.parameters(recurse=False))
    ]
    hooks = [module.register_forward_hook(_note(seen)) for module in outside]
    for layer in found:
        hooks.append(layer.register_forward_pre_hook(lambda _, args: seen.entered.append(args[0])))
        hooks.append(layer.register_forward_hook(lambda _, args, made: seen.left.append(made)))
    ids = torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device)
    state = generator.get_state()
    try:
        with autocast:
            model(input_ids=ids, use_cache=False)
    except (TypeError, IndexError) as error:
        raise NoStages("it does not compute from input_ids alone") from error
    finally:
        for hook in hooks:
            hook.remove()
        seen.draws = not torch.equal(state, generator.get_state())
        generator.set_state(state)
    seen.before += [module for module in outside if module not in {*seen.before, *seen.after}]  # never used
    _check(model, seen, outside, ids)
    seen.costs = _costs(seen)
    return seen


def _note(seen: Watched) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, made: Any) -> None:
        if seen.entered and len(seen.left) < len(seen.layers):
            raise NoStages("its layers share what is outside of them")
        part = seen.after if seen.left else seen.before
        if module not in part:
            part.append(module)
        if isinstance(made, Tensor):
            seen.widths[module] = made.shape[-1]

    return note


def _check(model: nn.Module, seen: Watched, outside: list[nn.Module], ids: Tensor) -> None:
    made = [each[0] if isinstance(each, tuple) else each for each in seen.left]
    if len(made) < len(seen.layers) or any(
        a is not b for a, b in zip(made[:-1], seen.entered[1:], strict=True)
    ):
        raise NoStages("it computes something between its layers")
    if any(each.shape[:-1] != ids.shape for each in seen.entered):
        raise NoStages("its hidden states are not a row for each token")
    if any(seen.layers in module.modules() for module in outside):
        raise NoStages("it has parameters around its layers")
    kept = [layer.state_dict().keys() - dict(layer.named_parameters()).keys() for layer in seen.layers]
    if any(kept):
        raise NoStages("its layers have buffers that a checkpoint holds")
    if any(p.dim() == 0 for p in model.parameters()):
        raise NoStages("it has a parameter without a dim")
    inner = [id(p) for layer in seen.layers for p in layer.parameters()]
    outer = {id(p) for module in outside for p in module.parameters(recurse=False)}
    if len(set(inner)) < len(inner) or outer & set(inner):
        raise NoStages("two of its layers share a parameter")


def _costs(seen: Watched) -> tuple[list[float], float, float]:
    """The weights that a token is multiplied by.

    Of an embedding a token takes one row. What attention costs beside its weights is the same for every layer
    and depends on the window: it is left out.
    """
    before, after = (sum(map(_own_cost, part)) for part in (seen.before, seen.after))
    return [sum(map(_own_cost, layer.modules())) for layer in seen.layers], before, after


def _own_cost(module: nn.Module) -> float:
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return sum(p.numel() for p in module.parameters(recurse=False))
