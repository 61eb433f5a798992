"""Momentum for gradients that are stale: delayed Nesterov."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class DelayedNesterov(torch.optim.Optimizer):
    """Delayed Nesterov (Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling", with c = 0).

    Every gradient D moves the parameters at once; the momentum, which stale gradients would compound, only every
    `period` arrivals, by their mean: m = beta m + mean(D), theta -= lr (D + period beta m). With lr = epsilon / N
    and period N these are the paper's epsilon D / N and epsilon beta m; period 1 is Nesterov's method. Beta 0.9 and
    the rule are from memory of the paper, and agree with a second implementation of it.
    Weight decay is decoupled: theta *= 1 - lr decay. Holds 8 bytes a parameter: the momentum and the sum of D.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        period: int,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "period": period, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Process the gradients in `.grad` as one arrival."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["momentum_buffer"], state["arrived"] = torch.zeros_like(p), torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.grad is not None:
                    self._arrive(p, p.grad, state, *(group[key] for key in ("lr", "period", "momentum")))

    @staticmethod
    def _arrive(
        p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, period: int, momentum: float
    ) -> None:
        state["step"] += 1
        state["arrived"] += grad
        p.sub_(grad, alpha=lr)
        if state["step"] % period == 0:
            state["momentum_buffer"].mul_(momentum).add_(state["arrived"], alpha=1 / period)
            state["arrived"].zero_()
            p.sub_(state["momentum_buffer"], alpha=lr * period * momentum)
