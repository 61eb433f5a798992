"""How a step changes the parameters: optimizers from torch, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
NamedParams = list[tuple[str, nn.Parameter]]


class OneBitAdam(torch.optim.AdamW):
    """1-bit Adam (Tang et al. 2021, algorithm 1): AdamW for `warmup` steps, then with the second moment v as it is.

        x -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^T)) + eps) + wd x)        t > T = warmup

    From step T on the gradient that it is handed is m itself: what `--codec sign --codec-momentum` makes of the
    ranks' gradients. (The paper corrects no bias; here step T + 1 differs from AdamW's by v alone.) It replaces
    sending gradients whole where links are slow, and needs gradients that are not clipped: m is not.
    """

    def __init__(self, groups: list[dict], *, warmup: int, **options: Any) -> None:
        super().__init__(groups, **options)
        self.warmup = warmup

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update: by gradients in this optimizer's own first `warmup` steps, and by the momentum after them."""
        params = [p for group in self.param_groups for p in group["params"]]
        taken = int(self.state[params[0]].get("warm", 0))  # a state may be AdamW's, which knows of no warm-up
        if taken < self.warmup:
            super().step(closure)
        else:
            self._step_frozen(taken - self.warmup)
        for p in params:
            self.state[p]["warm"] = torch.tensor(taken + 1)

    def _step_frozen(self, steps_before: int) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                seen = state["step"].item() - steps_before  # by v
                state["step"] += 1
                state["exp_avg"].copy_(p.grad)
                spread = (state["exp_avg_sq"] / (1 - beta2**seen)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1 - beta1 ** state["step"].item())
                p.addcdiv_(p.grad, spread, value=-rate)


def build(
    name: str,
    params: NamedParams,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    warmup: int = 0,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together own `params`. Only matrices decay.

    `momentum` is that of `sgd`, and the first one of `onebit-adam`, whose second is kept after `warmup` steps.

    `muon` (Jordan et al., 2024; torch.optim.Muon) takes the hidden matrices, scaled to the root mean square
    of AdamW's updates so that the same learning rate fits both; AdamW takes the rest.
    """
    matrices = [(n, p) for n, p in params if p.dim() >= 2]
    vectors = [(n, p) for n, p in params if p.dim() < 2]
    if name == "sgd":
        return [
            torch.optim.SGD(_groups(matrices, vectors, weight_decay), lr=learning_rate, momentum=momentum)
        ]
    if name == "adamw":
        return [_adamw(_groups(matrices, vectors, weight_decay), learning_rate)]
    if name == "onebit-adam":
        groups = _groups(matrices, vectors, weight_decay)
        options = ADAM | {"betas": (momentum, ADAM["betas"][1])}
        return [OneBitAdam(groups, warmup=warmup, lr=learning_rate, **options)]
    hidden = [(n, p) for n, p in matrices if p.dim() == 2 and not _is_embedding(n)]
    rest = [(n, p) for n, p in matrices if p.dim() != 2 or _is_embedding(n)]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest or vectors:
        optimizers.append(_adamw(_groups(rest, vectors, weight_decay), learning_rate))
    return optimizers


def _adamw(groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=learning_rate, **ADAM)


def _groups(decayed: NamedParams, others: NamedParams, weight_decay: float) -> list[dict]:
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: float, kind: str = "cosine"
) -> float:
    """The rate of `step` (from 0): linear warm-up to `peak`, then cosine or linear to zero, or constant.

    `warmup_steps` below 1 is a share of `total_steps`.
    """
    warmup = round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done)


class NamedState:
    """The state of several optimizers as tensors named by parameter: what a checkpoint holds."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], params: NamedParams) -> None:
        self.optimizers = optimizers
        self.names: dict[Tensor, str] = {p: n for n, p in params}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of "parameter/part" and the live tensor, for example "lm_head.weight/exp_avg"."""
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                for part, tensor in state.items():
                    if isinstance(tensor, Tensor):
                        yield f"{self.names[p]}/{part}", tensor

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Set the state of each parameter to what `read(its name)` gives, by part; {} leaves it fresh."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = read(self.names[p])
                    if state:
                        optimizer.state[p] = {
                            part: tensor.to(p.device if tensor.dim() else "cpu")
                            for part, tensor in state.items()
                        }
