"""How a step changes the parameters: optimizers from torch, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shoal.config import RunConfig
from shoal.config.optimizers import OPTIMIZERS
from shoal.tensors.tensor_files import CODES

MOMENTUM = 0.9  # of SGD
RANDOM_RATE, TRAINED_RATE = 3e-3, 2e-5  # where none is given, by the weights that training begins with
BETAS, EPS = (0.9, 0.95), 1e-8  # of Adam
LIKE_PARAMETER = {
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
}  # parts of the state that have a parameter's shape
NamedParams = list[tuple[str, nn.Parameter]]


class OneBitAdam(torch.optim.AdamW):
    """1-bit Adam (Tang et al. 2021, algorithm 1): AdamW for T steps, then with the second moment v as it is.

        x -= lr (m / (1 - b1^T) / (sqrt(v / (1 - b2^T)) + eps) + wd x)        after T

    By then the gradient that it is handed is m itself: what `--codec sign --codec-momentum` makes of the ranks'
    gradients, once `--codec-warmup` is over. (The paper corrects no bias; here nothing jumps at T.) It replaces
    sending gradients whole where links are slow, and needs gradients that are not clipped: m is not.
    """

    # Whether the gradient is m, which its maker knows.
    is_momentum: Callable[[], bool] = staticmethod(lambda: False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, by the gradient or by the momentum."""
        if not self.is_momentum():
            super().step(closure)
            return
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                steps = state["step"].item()  # T: it stands still from now on
                spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                state["exp_avg"].copy_(p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(p.grad, spread, value=-group["lr"] / (1 - beta1**steps))


@dataclass(frozen=True)
class Hyperparameters:
    """Of any optimizer: each takes what it has. `momentum` is that of `sgd`, and the first beta of `onebit-adam`."""

    learning_rate: float
    weight_decay: float
    momentum: float = MOMENTUM
    betas: tuple[float, float] = BETAS
    eps: float = EPS

    @property
    def adam(self) -> dict[str, Any]:
        """What torch's AdamW takes."""
        return {"lr": self.learning_rate, "betas": self.betas, "eps": self.eps, "fused": True}


def with_rate(config: RunConfig, *, trained: bool) -> RunConfig:
    """The configuration with the default learning rate of a model whose weights are `trained`, or random."""
    if config.train.learning_rate is not None:
        return config
    train = config.train.model_copy(update={"learning_rate": TRAINED_RATE if trained else RANDOM_RATE})
    return config.model_copy(update={"train": train})


def of_config(config: RunConfig) -> Hyperparameters:
    """Those of a run, but never a momentum that the codec takes already."""
    train, in_codec = config.train, config.strategy.codec_momentum
    own = {"own": MOMENTUM, "own or the codec's": 0.0 if in_codec else MOMENTUM, "the codec's": in_codec}
    assert train.learning_rate is not None, "the rate of a run is known once its weights are"
    return Hyperparameters(
        train.learning_rate,
        train.weight_decay,
        own[train.optimizer.momentum],
        (train.adam_beta1, train.adam_beta2),
        train.adam_epsilon,
    )


def build(name: str, params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    """The optimizers that together own `params`. Only matrices decay."""
    return MAKERS[name](params, options)


def _adamw(params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(decay_groups(params, options.weight_decay), **options.adam)]


def _adamw_8bit(params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    from shoal.optim.eight_bit import AdamW8bit  # torchao takes seconds to import

    groups = decay_groups(params, options.weight_decay)
    return [AdamW8bit(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)]


def _muon(params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024; torch.optim.Muon) for the hidden matrices, AdamW for the rest.

    Scaled to the root mean square of AdamW's updates, so that the same learning rate fits both.
    """
    hidden = [(n, p) for n, p in params if _is_hidden_matrix(n, p)]
    rest = [(n, p) for n, p in params if not _is_hidden_matrix(n, p)]
    muon = partial(torch.optim.Muon, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizers: list[torch.optim.Optimizer] = [muon(hidden, lr=options.learning_rate)] if hidden else []
    return optimizers + (_adamw(rest, options) if rest else [])


def _sgd(params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    groups = decay_groups(params, options.weight_decay)
    return [torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)]


def _onebit_adam(params: NamedParams, options: Hyperparameters) -> list[torch.optim.Optimizer]:
    groups = decay_groups(params, options.weight_decay)
    return [OneBitAdam(groups, **options.adam | {"betas": (options.momentum, options.betas[1])})]


# An optimizer is one row here, and its traits in `shoal.config.optimizers`:
# (parameters by name, hyperparameters) -> the optimizers that together own them.
MAKERS: dict[str, Callable[[NamedParams, Hyperparameters], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "muon": _muon,
    "sgd": _sgd,
    "onebit-adam": _onebit_adam,
}


def goes_on(saved: str, name: str) -> bool:
    """Whether the optimizer `name` can take up the state of the one that was `saved` ("": not known)."""
    alike = {saved, name} <= OPTIMIZERS.keys() and OPTIMIZERS[saved].keeps == OPTIMIZERS[
        name
    ].keeps == "two moments"
    return saved in ("", name) or alike


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """The bytes of state: two moments, one or none, or codes and scales; and counts of steps."""
    return sum(
        _state_bytes(optimizer, p, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _state_bytes(optimizer: torch.optim.Optimizer, p: Tensor, group: dict[str, Any]) -> int:
    if isinstance(optimizer, Coded):
        return optimizer.state_bytes(p)
    if "betas" in group:
        return 2 * p.nbytes + 4
    return p.nbytes if group["momentum"] else 0


def state_dtype(name: str, held: torch.dtype) -> torch.dtype:
    """The dtype in which the optimizer `name` keeps its state of a large parameter; that of others is `held`."""
    return torch.uint8 if OPTIMIZERS[name].in_codes else held


def decay_groups(params: NamedParams, weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer in which only matrices decay."""
    groups = [
        {"params": [(n, p) for n, p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


# What share of the peak the rate is, once this share of the steps after warm-up is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: float,
    kind: str = "cosine",
    lowest: float = 0.0,
) -> float:
    """The rate of `step` (from 0): linear warm-up to `peak`, then as the schedule `kind` has it, down to `lowest`.

    `warmup_steps` below 1 is a share of `total_steps`.
    """
    warmup = round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return lowest + (peak - lowest) * SCHEDULES[kind]((step - warmup) / max(1, total_steps - warmup))


@runtime_checkable
class Coded(Protocol):
    """An optimizer whose state is not plain tensors, but goes in and out as such."""

    def plain(self, p: Tensor) -> dict[str, Tensor]:
        """The live state of a parameter, by part."""
        ...

    def state_bytes(self, p: Tensor) -> int:
        """The bytes of state of a parameter."""
        ...

    def adopt(self, p: Tensor, parts: dict[str, Tensor]) -> None:
        """Set the state of a parameter to such parts, its own or those of another optimizer."""
        ...


class NamedState:
    """The state of several optimizers as tensors named by parameter: what a checkpoint holds."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], params: NamedParams) -> None:
        self.optimizers = optimizers
        self.names: dict[Tensor, str] = {p: n for n, p in params}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of "parameter/part" and the live tensor, for example "lm_head.weight/exp_avg"."""
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                parts = optimizer.plain(p) if isinstance(optimizer, Coded) else state
                for part, tensor in parts.items():
                    if isinstance(tensor, Tensor):
                        yield f"{self.names[p]}/{part}", tensor

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Set the state of each parameter to a copy of what `read(its name)` gives, in its dtype; {}: fresh."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = read(self.names[p])
                    if state and isinstance(optimizer, Coded):
                        optimizer.adopt(p, state)
                    elif state:
                        if "exp_avg" + CODES in state:
                            state = _wide(state)
                        # A fused kernel reads the count of steps where the parameter is.
                        counts = p.device if group.get("fused") else torch.device("cpu")
                        optimizer.state[p] = {
                            part: _like(p, tensor) if tensor.dim() else tensor.to(counts, copy=True)
                            for part, tensor in state.items()
                        }


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that an optimizer kept in codes, as others keep it."""
    from shoal.optim.eight_bit import wide

    return wide(state)


def _like(p: Tensor, state: Tensor) -> Tensor:
    """A copy of state where `p` is, numbers in its dtype."""
    return state.to(p.device, p.dtype if state.is_floating_point() else state.dtype, copy=True)
