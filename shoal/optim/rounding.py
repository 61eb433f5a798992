"""Parameters held in bfloat16: updated in float32, and rounded by chance, so that small updates are not lost.

bfloat16 keeps 8 bits of a number: an update below 1/512 of a weight is rounded away, each time anew, and training
stands still where its steps get small. Rounded up or down by chance, with the odds of what lies between, the
expectation of a weight is what it would be in float32 (Zamirai et al. 2020, "Revisiting BFloat16 Training",
section 4.1). Replaces float32 weights where memory is short: 2 bytes for a weight and for each of its two moments.
Its gradient takes 4: sums over micro-batches and ranks are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoal.data.order import derive_seed
from shoal.optim.optimizers import Hyperparameters, decay_groups
from shoal.tensors.piece import Piece, named

BELOW = 16  # bits of a float32 that a bfloat16 has not
ODDS = (1 << BELOW) - 1


class RoundedAdamW(torch.optim.AdamW):
    """AdamW whose weights and moments are bfloat16: its arithmetic is float32, a tensor at a time.

    Weights are rounded by chance, moments to the nearest, as published: with a second beta of 0.95 they move by
    more than what is rounded away. The draw for an element follows from (seed, parameter, update, its index in the
    whole parameter), and from nothing else: ranks that hold the same piece agree in bits, a piece is rounded as the
    whole would be, and a resumed run goes on alike. Costs four float32 tensors of the largest piece meanwhile.
    """

    def __init__(self, pieces: Sequence[Piece], options: Hyperparameters, *, seed: int) -> None:
        groups = decay_groups(named(pieces), options.weight_decay)
        super().__init__(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
        self.seed = seed
        self.pieces = {piece.local: piece for piece in pieces}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self._state_of(p), group)

    def _state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        weight, first, second = p.float(), state["exp_avg"].float(), state["exp_avg_sq"].float()
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [grad.float()], [first], [second], [], [state["step"]], foreach=False, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        piece = self.pieces[p]
        key = derive_seed(self.seed, "rounding", piece.name, int(state["step"].item()))
        p.copy_(round_by_chance(weight, draws(key, places(piece))))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)


def round_by_chance(values: Tensor, draw: Tensor) -> Tensor:
    """One of the two bfloat16 next to each of `values` (float32), given uniform draws (int32, of 16 bits).

    The bits that bfloat16 lacks are the odds of the greater one in magnitude; what fits is left as it is.
    """
    return ((values.view(torch.int32) + draw) & ~ODDS).view(torch.float32).to(torch.bfloat16)


def draws(key: int, index: Tensor) -> Tensor:
    """16 random bits for each of `index` (int32), the same for the same (key, index) on any device.

    A hash of 32 bits: "lowbias32" (Wellons 2018, hash-prospector), its constants as signed integers.
    """
    bits = index ^ (key & 0x7FFFFFFF)
    bits = bits ^ _shifted(bits, 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ _shifted(bits, 15)
    bits = bits * (0x846CA68B - (1 << 32))
    return _shifted(bits, 16)


def places(piece: Piece) -> Tensor:
    """Where each element of a piece stands in the whole parameter read row by row: int32, wrapped beyond 2^31."""
    index = torch.zeros((), dtype=torch.int64, device=piece.local.device)
    for dim, (start, size) in enumerate(zip(piece.offset, piece.local.shape, strict=True)):
        stride = piece.shape[dim + 1 :].numel()
        along = torch.arange(start, start + size, device=index.device) * stride
        index = index[..., None] + along
    return index.to(torch.int32)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """To the right, zeros from the left: torch's shift would repeat the sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)
