"""What a parameter server must keep whatever its rule: once, bounded, robust, and equal where it says it is."""

from functools import cache

import numpy as np
import pytest
import torch
from simulator import Simulator
from sync.server_rules import (
    LABELS,
    SIZE,
    START,
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
from torch import Tensor, nn

from shoal.servers.core import END, Push, norm_of
from shoal.servers.delayed import DelayedNesterov
from shoal.servers.merge import Merge, mean, median, trimmed_mean
from shoal.servers.ranges import cut, runs
from shoal.servers.update_rules import Arrivals, Rounds

draw = np.random.default_rng(3)


def whole(worker: int, step: int, theta: Tensor) -> Tensor:
    """The gradient of one worker that has all labels."""
    return torch.from_numpy(slope(worker, step, theta.numpy()))


@each_optimizer
def test_one_worker_on_arrival_is_sequential(optimizer: str) -> None:
    server = serve(Arrivals(schedule, delay_compensation=0.5, staleness_lr=True), optimizer)
    events = Simulator(server, whole, [4]).run(STEPS)
    hand = ByHand(optimizer)
    for step in range(STEPS):
        hand.step(slope(0, step, hand.theta), schedule(step))
    agrees(server, hand.theta)
    assert {event.staleness for event in events} == {0}


def test_at_no_staleness_on_arrival_is_synchronous() -> None:
    """Plain SGD: every worker's push of a step is made at the same parameters, and they add up."""
    one, other = (
        serve(Arrivals(schedule), "sgd"),
        serve(Rounds(mean, schedule, quorum=None, max_norm=0.0), "sgd"),
    )
    even = [2, 2, 2]
    equal = lambda worker, step, theta: share(worker, step, theta) * (sum(LABELS) / LABELS[worker] / 3)  # noqa: E731
    for server in (one, other):
        Simulator(server, equal, even, duration=delays, max_staleness=0).run(STEPS)
        assert server.version == WORKERS * STEPS
    torch.testing.assert_close(one.flat, other.flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("bound", [1, 2, 4])
def test_nobody_is_further_ahead_than_the_bound(bound: int, ahead: bool) -> None:
    clocks = [0] * WORKERS
    reached = 0
    server = serve(Arrivals(schedule), "sgd")
    slow = lambda worker, step: 10.0 if worker == 1 else 1.0  # noqa: E731
    for event in Simulator(server, share, LABELS, duration=slow, max_staleness=bound, ahead=ahead).run(STEPS):
        clocks[event.worker] += 1
        reached = max(reached, max(clocks) - min(clocks))
    assert reached == bound + 1 - ahead  # ahead, the bound is kept for a push that is still to come


def test_without_a_bound_nobody_waits() -> None:
    server = serve(Arrivals(schedule), "sgd")
    slow = lambda worker, step: 100.0 if worker == 1 else 1.0  # noqa: E731
    events = Simulator(server, share, LABELS, duration=slow).run(STEPS)
    assert [event.worker for event in events[: 2 * STEPS]] == [0, 2] * STEPS


def test_the_simulator_repeats_itself() -> None:
    runs = []
    for _ in range(2):
        server = serve(Arrivals(schedule), "adamw")
        runs.append((Simulator(server, share, LABELS, duration=delays).run(STEPS), server.flat.clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("synchronous", [False, True])
def test_a_push_that_comes_again_is_applied_once(synchronous: bool) -> None:
    rule = Rounds(mean, schedule, quorum=None, max_norm=0.0) if synchronous else Arrivals(schedule)
    server = serve(rule, "momentum")
    server.begin(server.params, range(2), 0)
    pushes = [Push(w, 0, 0, 1, 2, torch.full((SIZE,), w + 1.0, dtype=torch.float64)) for w in range(2)]
    assert [server.push(push) for push in (pushes[0], pushes[0], pushes[1], pushes[1])] == [True, False] * 2
    server.ask(0, 1, 1.0)
    before = server.flat.clone()
    assert server.version == 2
    assert not server.push(pushes[0])
    server.ask(0, 1, 1.0)
    assert server.version == 2
    assert torch.equal(server.flat, before)


@pytest.mark.parametrize("weight", [0.04, 2.0])
def test_compensation_changes_nothing_at_staleness_zero(weight: float) -> None:
    flats = []
    for compensation in (0.0, weight):
        server = serve(Arrivals(schedule, delay_compensation=compensation), "adamw")
        Simulator(server, whole, [1]).run(STEPS)
        flats.append(server.flat)
    assert torch.equal(*flats)


def test_compensation_holds_a_copy_for_each_push_under_way() -> None:
    rule = Arrivals(schedule, delay_compensation=0.1)
    server = serve(rule, "sgd")
    most = 0

    def watched(worker: int, step: int, theta: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len({id(copy) for held in rule.backups.values() for copy in held.values()}))
        return share(worker, step, theta)

    Simulator(server, watched, LABELS, duration=delays, ahead=True).run(STEPS)
    assert 2 <= most <= 3 * WORKERS
    assert rule.backups == {}


def test_delayed_nesterov_of_period_one_is_nesterov() -> None:
    one, other = (nn.Parameter(torch.from_numpy(START.copy())) for _ in range(2))
    rules = (
        DelayedNesterov([one], 0.1, period=1, momentum=0.9),
        torch.optim.SGD([other], lr=0.1, momentum=0.9, nesterov=True),
    )
    for step in range(STEPS):
        for p, rule in zip((one, other), rules, strict=True):
            p.grad = torch.from_numpy(slope(0, step, p.detach().numpy()))
            rule.step()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def pushes_of(gradients: np.ndarray, labels: list[int]) -> list[Push]:
    """Pushes of workers whose gradients a label are these."""
    total = sum(labels)
    return [
        Push(w, 0, 0, labels[w], total, torch.from_numpy(g * labels[w] / total))
        for w, g in enumerate(gradients)
    ]


def merged(merge: Merge, gradients: np.ndarray, labels: list[int]) -> np.ndarray:
    out = torch.full((gradients.shape[1],), 7.0, dtype=torch.float64)
    merge(pushes_of(gradients, labels), out)
    return out.numpy()


ROBUST: list[Merge] = [median, trimmed_mean(0.25)]


@pytest.mark.parametrize("poison", [1e30, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("merge", ROBUST)
def test_robust_merges_withstand_one_poisoned_worker(merge: Merge, poison: float) -> None:
    gradients = draw.normal(size=(5, 400))
    honest = gradients[1:].copy()
    gradients[0] = poison
    found = merged(merge, gradients, [4] * 5)
    assert (found >= honest.min(0)).all()
    assert (found <= honest.max(0)).all()
    spoilt = merged(mean, gradients, [4] * 5)
    assert not (np.abs(spoilt) < 1e20).any()


def test_training_goes_on_with_a_poisoned_worker() -> None:
    def poisoned(worker: int, step: int, theta: Tensor) -> Tensor:
        return share(worker, step, theta) * (-1e6 if worker == 0 else 1.0)

    for merge, survives in ((median, True), (trimmed_mean(0.3), True), (mean, False)):
        server = serve(Rounds(merge, schedule, quorum=None, max_norm=0.0), "sgd")
        Simulator(server, poisoned, [2, 2, 2], max_staleness=0).run(STEPS)
        assert (server.flat.abs().max() < 10) == survives


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_with_equal_labels_they_are_those_of_numpy(count: int) -> None:
    gradients = draw.normal(size=(count, 50))
    np.testing.assert_allclose(merged(median, gradients, [3] * count), np.median(gradients, 0), atol=1e-12)
    left_out = min(1, (count - 1) // 2)
    kept = np.sort(gradients, 0)[left_out : count - left_out]
    np.testing.assert_allclose(merged(trimmed_mean(0.2), gradients, [3] * count), kept.mean(0), atol=1e-12)
    np.testing.assert_allclose(merged(mean, gradients, [3] * count), gradients.mean(0), atol=1e-12)


def test_labels_weigh() -> None:
    """A worker of three labels counts as three workers of one; one without labels not at all."""
    gradients = draw.normal(size=(3, 50))
    repeated = gradients[[0, 1, 2, 2, 2]]
    np.testing.assert_allclose(merged(median, gradients, [1, 1, 3]), np.median(repeated, 0), atol=1e-12)
    np.testing.assert_allclose(merged(mean, gradients, [1, 1, 3]), repeated.mean(0), atol=1e-12)
    for merge in (median, mean):
        without = merged(merge, gradients[:2], [2, 3])
        np.testing.assert_allclose(merged(merge, gradients, [2, 3, 0]), without, atol=1e-12)


def test_a_quorum_takes_the_first_and_drops_the_late() -> None:
    """Two of three: worker 1, always last, is a backup that is never needed."""
    rule = Rounds(mean, schedule, quorum=2, max_norm=0.0)
    server = serve(rule, "sgd")
    Simulator(server, share, LABELS, duration=lambda w, s: [1.0, 9.0, 1.1][w], max_staleness=0).run(STEPS)
    hand = ByHand("sgd")
    for step in range(STEPS):
        g = sum(slope(w, step, hand.theta) * LABELS[w] for w in (0, 2)) / (LABELS[0] + LABELS[2])
        hand.step(g, schedule(step))
    agrees(server, hand.theta)
    assert server.version == 2 * STEPS
    assert rule.late > 0


def test_a_dead_worker_fills_the_quorum_or_fails_it() -> None:
    for quorum, survives in ((2, True), (None, False)):
        server = serve(Rounds(mean, schedule, quorum=quorum, max_norm=0.0), "sgd")
        server.begin(server.params, range(3), 0)
        server.push(Push(0, 0, 0, 1, 3, torch.ones(SIZE, dtype=torch.float64)))
        server.leave(2, parted=False)
        assert not server.answers(0)
        assert bool(server.failure) != survives
        server.push(Push(1, 0, 0, 1, 3, torch.ones(SIZE, dtype=torch.float64)))
        if survives:
            server.ask(1, 1, 1.0)
            assert server.version == 2


def test_who_parts_in_order_is_not_waited_for() -> None:
    server = serve(Rounds(mean, schedule, quorum=None, max_norm=0.0), "sgd")
    server.begin(server.params, range(3), 0)
    server.ask(2, END, 1.0)
    for worker in range(2):
        server.push(Push(worker, 0, 0, 1, 2, torch.ones(SIZE, dtype=torch.float64)))
    assert server.answers(0)
    assert not server.failure
    assert not server.opens(END)


def test_workers_come_and_go_on_arrival() -> None:
    server = serve(Arrivals(schedule), "sgd")
    server.begin(server.params, range(2), 0)
    gradient = torch.ones(SIZE, dtype=torch.float64)
    for step in range(3):
        server.push(Push(0, step, server.version, 1, 2, gradient))
    assert not server.opens(2)  # worker 1 has taken no step
    server.leave(1, parted=False)
    assert server.opens(2)
    server.join(5)
    assert server.clocks[5] == 3
    assert server.push(Push(5, 3, server.version, 1, 2, gradient))
    server.join(1)
    assert not server.opens(2)  # it is back, where it was
    assert server.push(Push(1, 0, 0, 1, 2, gradient))
    assert server.version == 5


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_clock() -> None:
    server = serve(Arrivals(schedule), "momentum")
    server.begin(server.params, range(1), 0)
    server.push(Push(0, 0, 0, 1, 1, None))
    assert (server.version, server.clocks[0], server.rule.seen) == (0, 1, 1.0)
    agrees(server, START)
    server = serve(Rounds(mean, schedule, quorum=None, max_norm=1.0), "momentum")
    server.begin(server.params, range(1), 0)
    server.push(Push(0, 0, 0, 1, 1, torch.full((SIZE,), float("nan"), dtype=torch.float64)))
    server.ask(0, 1, float("inf"))
    assert (server.version, server.opens(1)) == (0, True)
    agrees(server, START)


def test_what_is_read_is_a_copy() -> None:
    server = serve(Arrivals(schedule), "sgd")
    server.begin(server.params, range(1), 0)
    held = torch.empty(SIZE, dtype=torch.float64)
    server.read(0, held)
    server.push(Push(0, 0, 0, 1, 1, torch.ones(SIZE, dtype=torch.float64)))
    np.testing.assert_array_equal(held.numpy(), START)


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 20])
def test_ranges_are_as_even_as_whole_parameters_allow(servers: int) -> None:
    sizes = [int(size) for size in draw.integers(1, 50, 12)]
    found = runs(sizes, servers)
    assert [i for run in found for i in run] == list(range(12))
    assert len(found) <= servers
    assert all(found)
    largest = max(sum(sizes[i] for i in run) for run in found)
    assert largest == smallest_largest(tuple(sizes), servers)
    params = [(str(i), nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]
    assert [len(part) for part in cut(params, servers)] == [len(run) for run in found]


@cache
def smallest_largest(sizes: tuple[int, ...], servers: int) -> int:
    """By trying every cut."""
    if servers == 1 or len(sizes) == 1:
        return sum(sizes)
    return min(
        max(sum(sizes[:first]), smallest_largest(sizes[first:], servers - 1) if first < len(sizes) else 0)
        for first in range(1, len(sizes) + 1)
    )


def test_every_worker_learns_the_norm_of_a_step() -> None:
    """Also who hears of the full round when the first to hear has had it applied."""
    rule = Rounds(mean, schedule, quorum=None, max_norm=0.5)
    server = serve(rule, "sgd")
    server.begin(server.params, range(2), 0)
    for worker in range(2):
        server.push(Push(worker, 0, 0, 1, 2, torch.full((SIZE,), 1.0, dtype=torch.float64)))
    known = rule.squares(0)
    assert known == pytest.approx(4 * SIZE)
    server.ask(0, 1, norm_of(known))
    assert server.opens(1)
    assert rule.squares(0) == known
    assert rule.squares(1) < 0
    assert [norm_of(squares) for squares in (4.0, np.inf, np.nan)] == [2.0, np.inf, np.inf]
    assert np.isnan(norm_of(-1.0))
