"""A parameter server of a few numbers, three workers with quadratic losses, and the optimizers again by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.servers.core import ParameterServer, UpdateRule
from shoal.servers.delayed import DelayedNesterov

SIZE, STEPS, WORKERS = 7, 20, 3

DRAW = np.random.default_rng(5)

CENTRES = DRAW.normal(size=(WORKERS, STEPS, SIZE))

CURVES = DRAW.uniform(0.3, 1.5, size=(WORKERS, SIZE))

START = DRAW.normal(size=SIZE)

LABELS = [5, 2, 3]

RATE = 0.07

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1.0),
    "momentum": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.02),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "delayed": lambda params: DelayedNesterov(params, 1.0, period=WORKERS, momentum=0.8, weight_decay=0.1),
}

each_optimizer = pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])


def schedule(step: int) -> float:
    return RATE / (1 + 0.1 * step)


def slope(worker: int, step: int, theta: np.ndarray) -> np.ndarray:
    """The gradient a label of a worker's share: of a quadratic, another one for each worker and step."""
    return CURVES[worker] * (theta - CENTRES[worker, step])


def share(worker: int, step: int, theta: Tensor) -> Tensor:
    """What the worker pushes: its part of the gradient of the step."""
    return torch.from_numpy(slope(worker, step, theta.numpy()) * LABELS[worker] / sum(LABELS))


def serve(rule: UpdateRule, optimizer: str) -> ParameterServer:
    params = [
        ("a", nn.Parameter(torch.from_numpy(START[:4]).view(2, 2))),
        ("b", nn.Parameter(torch.from_numpy(START[4:]))),
    ]
    return ParameterServer(params, lambda named: [OPTIMIZERS[optimizer]([p for _, p in named])], rule)


class ByHand:
    """The optimizers again, on one flat array."""

    def __init__(self, name: str) -> None:
        self.name, self.theta, self.time = name, START.copy(), 0
        self.m, self.v, self.arrived = (np.zeros(SIZE) for _ in range(3))

    def step(self, g: np.ndarray, lr: float) -> None:
        self.time += 1
        if self.name == "sgd":
            self.theta -= lr * g
        elif self.name == "momentum":
            g = g + 0.02 * self.theta
            self.m = g.copy() if self.time == 1 else 0.9 * self.m + g
            self.theta -= lr * self.m
        elif self.name == "adamw":
            self.theta *= 1 - lr * 0.1
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g * g
            m, v = self.m / (1 - 0.9**self.time), self.v / (1 - 0.95**self.time)
            self.theta -= lr * m / (np.sqrt(v) + 1e-8)
        else:  # Liu et al. 2024, with epsilon = lr x N
            self.theta *= 1 - lr * 0.1
            self.arrived += g
            self.theta -= lr * g
            if self.time % WORKERS == 0:
                self.m = 0.8 * self.m + self.arrived / WORKERS
                self.theta -= lr * WORKERS * 0.8 * self.m
                self.arrived = np.zeros(SIZE)


def agrees(server: ParameterServer, theta: np.ndarray) -> None:
    np.testing.assert_allclose(server.flat.numpy(), theta, rtol=0, atol=1e-10)


def delays(worker: int, step: int) -> float:
    """Worker 1 takes three times as long, and stumbles once."""
    return [1.0, 3.1, 1.3][worker] + (5.0 if (worker, step) == (2, 4) else 0.0)
