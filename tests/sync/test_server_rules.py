"""Law 6 for the parameter server: the simulated rule is the published one, written again in float64 by hand."""

import numpy as np
import pytest
from laws.strategies import asks
from simulator import Event, Simulator
from sync.server_rules import (
    LABELS,
    OPTIMIZERS,
    STEPS,
    WORKERS,
    ByHand,
    agrees,
    delays,
    each_optimizer,
    schedule,
    serve,
    share,
    slope,
)

from shoal.servers.merge import mean
from shoal.servers.update_rules import Arrivals, Rounds


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


@asks(6, "async")
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
