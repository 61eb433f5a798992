"""What every layout gives: the pieces that a rank holds of one replica, and how that replica computes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shoal.piece import Piece, whole

Loss = Callable[[Any, dict[str, Tensor]], Tensor]  # (model, inputs) -> the sum over a micro-batch's labels


class Placed:
    """A model in its place. The rest of the program sees `pieces`, of every parameter one that may be empty here.

    `loss` is called in step with the whole island.
    """

    def __init__(self, model: nn.Module, pieces: list[Piece], loss: Loss) -> None:
        self.model = model
        self.pieces = pieces
        self.loss = loss

    @classmethod
    def whole(cls, model: nn.Module, loss: Loss) -> "Placed":
        """A model as it is, whole in this process."""
        return cls(model, whole(model), loss)

    @property
    def trained(self) -> list[Piece]:
        """Those that gradients come to."""
        return [piece for piece in self.pieces if piece.source.requires_grad and piece.local.numel()]

    def begin(self, *, last: bool) -> None:
        """Before each forward pass of a step; `last`: the gradients of the step are to be there after it."""
        return

    def release(self) -> None:
        """Free what forward passes without a backward pass have left, before parameters change."""
        return

    def bytes_sent(self) -> int:
        """By this rank, within the island, so far."""
        return 0

    def waited(self) -> float:
        """The seconds that this rank has waited for the others of its island, so far."""
        return 0.0

    def cost(self, turns: int) -> float:
        """The bytes that it sends there in a step of so many micro-batches each, as arithmetic."""
        return 0.0

    def __str__(self) -> str:
        return "every worker holds a whole replica"
