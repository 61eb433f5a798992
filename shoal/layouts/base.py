"""What every layout gives: the pieces that a rank holds of one replica, and how that replica computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config import LayoutConfig
from shoal.layouts.cutting import Watched
from shoal.tensors.piece import Piece, whole
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh

Function = Callable[[Any, dict[str, Tensor]], Tensor]  # (model, inputs) -> what a forward pass finds
Autocast = Callable[[], AbstractContextManager[object]]  # the context in which forward passes run


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass computes, on the rank's device; `seed` is that of its dropout."""

    inputs: dict[str, Tensor]
    seed: int


@dataclass
class Request:
    """What a layout is made from, beside the layout that it stands on.

    `empty_micro_batch` has no samples, and the shape of every micro-batch. `watched` is what the whole model has
    shown, where it is to be cut into stages.
    """

    mesh: Mesh
    policy: Policy
    options: LayoutConfig
    empty_micro_batch: dict[str, Tensor]
    watched: Watched | None = None


def shape_of(inputs: dict[str, Tensor]) -> tuple[int, int]:
    """The rows of a micro-batch, and the tokens in each: those of its first tensor."""
    rows, tokens = next(iter(inputs.values())).shape[:2]
    return rows, tokens


class PlacedModel:
    """A model in its place. All ranks of an island call its methods in step.

    `pieces` has one for every parameter, empty where another rank holds it. `loss` is the function that training
    differentiates: the sum over a micro-batch's labels. Members with an underscore are for other layouts alone: a
    layout stands on another one, its `inner`, and asks it for what it does not do itself.
    """

    singly = True  # micro-batches are computed one after the other, each by one backward pass

    def __init__(
        self, model: nn.Module, pieces: list[Piece], loss: Function, inner: "PlacedModel | None" = None
    ) -> None:
        self.model = model
        self.pieces = pieces
        self._loss = loss
        self._inner = inner
        while inner is not None:
            inner.pieces = pieces  # what was cut or left out is free
            inner = inner._inner

    def before_forward(self) -> None:
        """Fetch what other ranks train. Call it before the first forward pass after parameters have changed."""
        if self._inner is not None:
            self._inner.before_forward()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], scale: float, autocast: Autocast, *, last: bool
    ) -> list[float]:
        """Compute the gradients of each micro-batch's loss times `scale`. Returns the losses, 0 where others report.

        It gets one micro-batch or, where they are not computed `singly`, all that this rank has in a step. The
        gradients of a step are complete after its `last` call.
        """
        self._begin(last=last)
        found = []
        for each in micro_batches:
            torch.manual_seed(each.seed)
            with autocast():
                loss = self._apply(self._loss, each.inputs)
            (loss * scale).backward()
            found.append(loss.item() if self._reports else 0.0)
        return found

    def call(self, function: Function, inputs: dict[str, Tensor]) -> Tensor | None:
        """`function(model, inputs)`, forward only, of any shape; None where another rank of the team reports it.

        The function runs the model once. Ranks that hold parts of one window return terms of a sum.
        Call `before_forward` before the first of several, and `after_evaluation` after the last.
        """
        found = self._apply(function, inputs)
        return found if self._reports else None

    def after_evaluation(self) -> None:
        """Free what forward passes without a backward pass have left. Call it before parameters change."""
        if self._inner is not None:
            self._inner.after_evaluation()

    @property
    def _reports(self) -> bool:
        """Whether the results of this rank count: those of all ranks that report are the micro-batch's, once."""
        return self._inner is None or self._inner._reports

    def _apply(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        """The forward pass of `function` as this layout computes it."""
        if self._inner is None:
            return function(self.model, inputs)
        return self._inner._apply(function, inputs)

    def _begin(self, *, last: bool) -> None:
        """Called before each backward pass of a step, or before the `last` one."""
        if self._inner is not None:
            self._inner._begin(last=last)

    def _hidden_shape(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and tokens of hidden states between layers on this rank, in a micro-batch of this shape."""
        return (rows, tokens) if self._inner is None else self._inner._hidden_shape(rows, tokens)

    def _begin_tokens(self, rows: int, tokens: int) -> None:
        """A forward pass begins in the middle of the model: with hidden states of this shape from another worker."""
        if self._inner is not None:
            self._inner._begin_tokens(rows, tokens)

    def _recompute_context(self) -> AbstractContextManager[object]:
        """While a layer computes: the context for its one second forward pass."""
        return nullcontext() if self._inner is None else self._inner._recompute_context()

    @property
    def _reduced(self) -> set[torch.dtype]:
        """See `reduced_dtypes`."""
        return set() if self._inner is None else self._inner._reduced

    def _gathered(self) -> Iterator[Tensor]:
        """See `gathered_tensors`."""
        return iter(()) if self._inner is None else self._inner._gathered()

    def _held(self) -> dict[str, int]:
        """The bytes of parameters on this rank and, at most, of what is gathered at a time, as arithmetic."""
        if self._inner is not None:
            return self._inner._held()
        return {"parameters": sum(p.nbytes for p in self.model.parameters())}

    def _cost(self, turns: int, shape: tuple[int, int]) -> float:
        """The bytes that it sends there in a step of so many micro-batches each, as arithmetic.

        `shape` is that of a micro-batch: rows, and tokens in each.
        """
        return 0.0 if self._inner is None else self._inner._cost(turns, shape)

    def __str__(self) -> str:
        return "every worker holds a whole replica"


def whole_model(model: nn.Module, loss: Function) -> PlacedModel:
    """A model as it is, whole in this process."""
    return PlacedModel(model, whole(model), loss)


def recompute_context(placed: PlacedModel) -> Callable[[], AbstractContextManager[object]]:
    """For activation checkpointing: called while a layer computes, for the context of its second forward pass."""
    return placed._recompute_context


def reduced_dtypes(placed: PlacedModel) -> set[torch.dtype]:
    """The dtypes in which gradients were summed within the island, so far."""
    return placed._reduced


def gathered_tensors(placed: PlacedModel) -> Iterator[Tensor]:
    """The tensors into which other ranks' pieces are gathered, whether they hold any memory now or not."""
    return placed._gathered()


def bytes_held(placed: PlacedModel) -> dict[str, int]:
    """The bytes of parameters on this rank and, at most, of those gathered at a time, as arithmetic."""
    return placed._held()


def bytes_sent(placed: PlacedModel, turns: int, shape: tuple[int, int]) -> float:
    """The bytes that this rank sends within its island in a step of so many micro-batches, as arithmetic.

    `shape` is that of a micro-batch: rows, and tokens in each.
    """
    return placed._cost(turns, shape)
