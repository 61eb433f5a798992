"""Every stage of a model is compared with the whole model, before anything of it is cut."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    nothing: dict[str, Tensor],
    arithmetic: AbstractContextManager[object],
) -> None:
    """Raise NoStages where a stage computes other hidden states than the whole model, or another loss.

    They are compared on windows of one document and of several. `nothing` is a micro-batch without samples.
    """
    was_training = model.training
    model.eval()
    try:
        with arithmetic:
            for inputs in _inputs(seen, nothing):
                _compare(model, loss, seen, layers, inputs)
    finally:
        model.train(was_training)


def _inputs(seen: Watched, nothing: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of a few tokens that are labels too; the tokens are the first of the inputs."""
    device = seen.entered[0].device
    few = {name: tensor[:, :TOKENS].to(device) for name, tensor in nothing.items()}
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
        with _as_stage(model, seen, own, entered[own.start]):
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


@contextmanager
def _as_stage(model: nn.Module, seen: Watched, own: range, entering: Tensor) -> Iterator[None]:
    """Within it, the model computes as a worker does that holds only its `own` layers."""

    def enter(layer: nn.Module, args: Any) -> Any:
        return (entering, *args[1:])

    last = own.stop == len(seen.layers)
    hooks = [seen.layers[own.start].register_forward_pre_hook(enter)]
    hooks += [] if last else [seen.layers[own.stop - 1].register_forward_hook(stubs.leave)]
    kept = {*seen.after} if last else set()
    others = {module: stub for module, stub in stubs.before(seen).items() if module not in kept}
    places = stubs.in_places(model, others)
    before = [(parent, name, parent._modules[name]) for parent, name, _ in places]
    whole = seen.layers._modules
    stubs.put(places)
    seen.layers._modules = {
        str(index): seen.layers[index] if index in own else skip
        for index, skip in enumerate(stubs.skips(seen))
    }
    try:
        yield
    finally:
        seen.layers._modules = whole
        stubs.put(before)
        for hook in hooks:
            hook.remove()
