"""Law 6 for the parameter server: the simulated rule is the published one, written again in float64 by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from simulator import Event, Simulator
from torch import Tensor, nn

from shoal.servers.core import ParameterServer, UpdateRule
from shoal.servers.delayed import DelayedNesterov
from shoal.servers.merge import mean
from shoal.servers.update_rules import Arrivals, Rounds

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


def apply_by_hand(
    events: list[Event], optimizer: str, *, staleness_lr: bool, compensation: float, power: float, ahead: bool
) -> np.ndarray:
    """Asynchronous SGD, from the order of arrivals alone: who held what follows from it."""
    hand = ByHand(optimizer)
    given = {w: [(hand.theta.copy(), 0)] * (1 + ahead) for w in range(WORKERS)}
    seen = 0.0
    for version, event in enumerate(events):
        w, part = event.worker, LABELS[event.worker] / sum(LABELS)
        theta, at = given[w].pop(0)
        assert event.staleness == version - at
        g = slope(w, event.step, theta)
        g = g + compensation * g * g * (hand.theta - theta)
        rate = schedule(int(seen + 1e-9)) * part**power
        hand.step(g, rate / max(1, version - at) if staleness_lr else rate)
        seen += part
        given[w].append((hand.theta.copy(), version + 1))
    return hand.theta


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("compensation", [0.0, 0.5])
@pytest.mark.parametrize("staleness_lr", [False, True])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_on_arrival(optimizer: str, staleness_lr: bool, compensation: float, ahead: bool) -> None:
    power = 0.5 if optimizer == "adamw" else 1.0
    rule = Arrivals(schedule, staleness_lr=staleness_lr, delay_compensation=compensation, share_power=power)
    server = serve(rule, optimizer)
    events = Simulator(server, share, LABELS, duration=delays, ahead=ahead).run(STEPS)
    assert max(event.staleness for event in events) > 3
    theta = apply_by_hand(
        events, optimizer, staleness_lr=staleness_lr, compensation=compensation, power=power, ahead=ahead
    )
    agrees(server, theta)
    assert server.version == len(events) == WORKERS * STEPS


@pytest.mark.parametrize("max_norm", [0.0, 0.4])
@each_optimizer
def test_synchronous_rounds_are_the_optimizer_on_the_whole_gradient(optimizer: str, max_norm: float) -> None:
    server = serve(Rounds(mean, schedule, quorum=None, max_norm=max_norm), optimizer)
    Simulator(server, share, LABELS, duration=delays, max_staleness=0).run(STEPS)
    hand = ByHand(optimizer)
    for step in range(STEPS):
        g = sum(slope(w, step, hand.theta) * LABELS[w] for w in range(WORKERS)) / sum(LABELS)
        if max_norm:
            g = g * min(1.0, max_norm / (np.linalg.norm(g) + 1e-6))
        hand.step(g, schedule(step))
    agrees(server, hand.theta)
    assert server.version == WORKERS * STEPS
