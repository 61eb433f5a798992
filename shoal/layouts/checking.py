"""Every stage of a model is compared with the whole model, before anything of it is cut."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.layouts import stubs
from shoal.layouts.base import Function
from shoal.layouts.cutting import NoStages, Watched
from shoal.layouts.stubs import Left

TOKENS = 16


@torch.no_grad()
def check(
    model: nn.Module,
    loss: Function,
    seen: Watched,
    layers: Sequence[range],
    empty_micro_batch: dict[str, Tensor],
    autocast: AbstractContextManager[object],
) -> None:
    """Raise NoStages where a stage computes other hidden states than the whole model, or another loss.

    They are compared on windows of one document and of several.
    """
    was_training = model.training
    model.eval()
    try:
        with autocast:
            for inputs in _inputs(seen, empty_micro_batch):
                _compare(model, loss, seen, layers, inputs)
    finally:
        model.train(was_training)


def _inputs(seen: Watched, empty_micro_batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of a few tokens that are labels too; the tokens are the first of the inputs."""
    device = seen.entered[0].device
    few = {name: tensor[:, :TOKENS].to(device) for name, tensor in empty_micro_batch.items()}
    first = next(iter(few))
    known = min((m.num_embeddings for m in seen.before if isinstance(m, nn.Embedding)), default=1)
    tokens = torch.arange(few[first].numel(), device=device).view_as(few[first]) % known
    few |= {first: tokens, "labels": tokens}
    yield few
    if "documents" in few:
        yield {**few, "documents": few["documents"] + torch.arange(tokens.shape[1], device=device) // 5}


def _compare(
    model: nn.Module, loss: Function, seen: Watched, layers: Sequence[range], inputs: dict[str, Tensor]
) -> None:
    entered: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in seen.layers
    ]
    whole = loss(model, inputs)
    for hook in hooks:
        hook.remove()
    for own in layers[1:]:
        expected = whole if own.stop == len(seen.layers) else entered[own.stop]
        with _stage(model, seen, own, entered[own.start]):
            found = _found(model, loss, inputs)
        near = torch.finfo(found.dtype).eps ** 0.5
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=near, atol=near):
            raise NoStages("its later layers need more of its first ones than hidden states")


def _found(model: nn.Module, loss: Function, inputs: dict[str, Tensor]) -> Tensor:
    try:
        return loss(model, inputs)
    except Left as left:
        return left.hidden
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NoStages(f"without its first layers it ends in {type(error).__name__}: {error}") from error


def _stage(model: nn.Module, seen: Watched, own: range, entering: Tensor) -> AbstractContextManager[None]:
    """Within it, the model computes as on a worker that holds only the layers `own`."""

    def enter(layer: nn.Module, args: Any) -> Any:
        return (entering, *args[1:])

    kept = {*seen.after} if own.stop == len(seen.layers) else set()
    others = {module: stub for module, stub in stubs.before(seen).items() if module not in kept}
    view = stubs.view(list(seen.layers), stubs.skips(seen), own)
    return stubs.stage(seen.layers, own, view, stubs.in_places(model, others), enter)
