"""Shares: every micro-batch has one rank, and faster ranks take more."""

import itertools

import pytest

from shoal.errors import UserError
from shoal.replica import Shares
from shoal.shares import equal, fixed, proportional
from shoal.training.balance import WINDOW, Balancer


def slowest(counts: list[int], seconds: list[float]) -> float:
    return max(count * each for count, each in zip(counts, seconds, strict=True))


@pytest.mark.parametrize("micro_batches", range(1, 20))
def test_equal_shares_are_as_even_as_can_be(micro_batches: int) -> None:
    for ranks in range(1, micro_batches + 1):
        counts = equal(micro_batches, ranks).counts
        assert sum(counts) == micro_batches
        assert max(counts) - min(counts) <= 1
        assert min(counts) >= 1


@pytest.mark.parametrize("counts", [[4], [1, 3], [2, 1, 5], [1, 1, 1, 1]])
def test_every_micro_batch_has_exactly_one_rank_in_order(counts: list[int]) -> None:
    shares = Shares(counts)
    assert [v for rank in range(len(counts)) for v in shares.of(rank)] == list(range(sum(counts)))


@pytest.mark.parametrize(
    "seconds", [[1.0, 1.0], [1.0, 2.0], [1.0, 1.0, 3.0], [0.1, 5.0, 1.0], [1.0, 1.3, 0.7]]
)
@pytest.mark.parametrize("micro_batches", [4, 7, 10])
def test_no_other_shares_would_finish_sooner(micro_batches: int, seconds: list[float]) -> None:
    counts = proportional(micro_batches, seconds).counts
    every = itertools.product(range(1, micro_batches + 1), repeat=len(seconds))
    best = min(slowest(list(c), seconds) for c in every if sum(c) == micro_batches)
    assert sum(counts) == micro_batches
    assert min(counts) >= 1
    assert slowest(counts, seconds) == pytest.approx(best)


@pytest.mark.parametrize("text", ["3", "3,1,1", "4,1", "4,0", "5,-1", "a,b", "3,x", "", "3.0,1", "2,1"])
def test_shares_that_do_not_fit_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"2 workers share 4 micro-batches .*2,2"):
        fixed(text, 4, 2)


def test_fixed_shares_are_taken_as_given() -> None:
    assert fixed("3,1", 4, 2).counts == [3, 1]
    assert fixed(" 1 , 3", 4, 2).counts == [1, 3]


def watched(seconds: list[float], *, shares: Shares, steps: int) -> list[Shares]:
    """The shares after each of so many steps, with ranks that need `seconds` for one micro-batch."""
    balancer, held = Balancer(), []
    for _ in range(steps):
        shares = balancer.observe(shares, [s * c for s, c in zip(seconds, shares.counts, strict=True)])
        held.append(shares)
    return held


def test_the_balancer_moves_to_the_faster_rank_once_and_stays() -> None:
    held = watched([1.0, 3.0], shares=equal(8, 2), steps=4 * WINDOW)
    assert all(s.counts == [4, 4] for s in held[: WINDOW - 1])
    assert all(s.counts == [6, 2] for s in held[WINDOW - 1 :])


def test_the_balancer_leaves_even_ranks_alone() -> None:
    held = watched([1.0, 1.04], shares=equal(8, 2), steps=3 * WINDOW)
    assert all(s.counts == [4, 4] for s in held)


def test_one_slow_step_moves_nothing() -> None:
    balancer, shares = Balancer(), equal(8, 2)
    for step in range(WINDOW):
        shares = balancer.observe(shares, [4.0, 400.0 if step == 3 else 4.0])
    assert shares.counts == [4, 4]
