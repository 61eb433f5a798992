"""What every layout gives: the pieces that a rank holds of one replica, and how that replica computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.tensors.piece import Piece, whole

Loss = Callable[[Any, dict[str, Tensor]], Tensor]  # (model, inputs) -> the sum over a micro-batch's labels
Arithmetic = Callable[[], AbstractContextManager[object]]  # the context in which forward passes run


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass computes, on the rank's device; `seed` is that of its dropout."""

    inputs: dict[str, Tensor]
    seed: int


def shape_of(inputs: dict[str, Tensor]) -> tuple[int, int]:
    """The rows of a micro-batch, and the tokens in each: those of its first tensor."""
    rows, tokens = next(iter(inputs.values())).shape[:2]
    return rows, tokens


class PlacedModel:
    """A model in its place. The rest of the program sees `pieces`, of every parameter one that may be empty here.

    `loss` is called in step with the whole island. A layout may stand on another one, its `inner`: what it has no
    word on is as it is there.
    """

    one_by_one = True  # micro-batches are learnt from one after the other, each by one backward pass

    def __init__(
        self, model: nn.Module, pieces: list[Piece], loss: Loss, inner: "PlacedModel | None" = None
    ) -> None:
        self.model = model
        self.pieces = pieces
        self.loss = loss
        self.learnt = loss  # `loss`, or what was compiled of it
        self.inner = inner
        while inner is not None:
            inner.pieces = pieces  # what was cut or left out is free
            inner = inner.inner

    @classmethod
    def whole(cls, model: nn.Module, loss: Loss) -> "PlacedModel":
        """A model as it is, whole in this process."""
        return cls(model, whole(model), loss)

    @property
    def trained(self) -> list[Piece]:
        """Those that gradients come to."""
        return [piece for piece in self.pieces if piece.source.requires_grad and piece.local.numel()]

    @property
    def reports(self) -> bool:
        """Whether the losses of this rank count: those of all ranks that report add up to the micro-batch's."""
        return self.inner is None or self.inner.reports

    def hidden(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and tokens of hidden states between the layers here, in a micro-batch of so many."""
        return (rows, tokens) if self.inner is None else self.inner.hidden(rows, tokens)

    def enter(self, rows: int, tokens: int) -> None:
        """Where hidden states have come from another worker: a forward pass of so many goes on with its layers."""
        if self.inner is not None:
            self.inner.enter(rows, tokens)

    def again(self) -> AbstractContextManager[object]:
        """Asked as a layer computes: what is to be around it, once, when it computes the same again."""
        return nullcontext() if self.inner is None else self.inner.again()

    def learn(self, taken: Sequence[MicroBatch], scale: float, arithmetic: Arithmetic) -> list[float]:
        """Forward and backward over micro-batches, of each the loss times `scale`; returns the losses that count.

        It is called with one of them, or, where they are not taken one by one, with all that this rank has in a step.
        """
        found = []
        for each in taken:
            torch.manual_seed(each.seed)
            with arithmetic():
                loss = self.learnt(self.model, each.inputs)
            (loss * scale).backward()
            found.append(loss.item() if self.reports else 0.0)
        return found

    def refresh(self) -> None:
        """Before the first forward pass after parameters have changed: have what other ranks train."""
        if self.inner is not None:
            self.inner.refresh()

    def begin(self, *, last: bool) -> None:
        """Before each call of `learn` in a step; `last`: the gradients of the step are to be there after it."""
        if self.inner is not None:
            self.inner.begin(last=last)

    def release(self) -> None:
        """Free what forward passes without a backward pass have left, before parameters change."""
        if self.inner is not None:
            self.inner.release()

    @property
    def reduced(self) -> set[torch.dtype]:
        """The dtypes in which gradients were summed within the island, so far."""
        return set() if self.inner is None else self.inner.reduced

    def gathered(self) -> Iterator[Tensor]:
        """The tensors into which other ranks' pieces are gathered, whether they hold any memory now or not."""
        return iter(()) if self.inner is None else self.inner.gathered()

    def held(self) -> dict[str, int]:
        """The bytes of parameters on this rank and, at most, of what is gathered at a time, as arithmetic."""
        if self.inner is not None:
            return self.inner.held()
        return {"parameters": sum(p.nbytes for p in self.model.parameters())}

    def cost(self, turns: int, shape: tuple[int, int]) -> float:
        """The bytes that it sends there in a step of so many micro-batches each, as arithmetic.

        `shape` is that of a micro-batch: rows, and tokens in each.
        """
        return 0.0 if self.inner is None else self.inner.cost(turns, shape)

    def __str__(self) -> str:
        return "every worker holds a whole replica"
