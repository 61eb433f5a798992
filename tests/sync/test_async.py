"""The strategy `async` on real processes."""

from pathlib import Path

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import asks
from laws.worlds import first_difference, follow
from sync.central_worlds import SETTINGS, steps_of

TASK = RowsTask("tied", dropout=0.1)


@pytest.mark.parametrize("optim", ["sgd", "adamw", "muon"])
def test_one_worker_is_sequential(pool: Pool, tmp_path: Path, optim: str) -> None:
    settings = SETTINGS | {"optim": optim, "precision": "32-true"}
    (one,) = pool.world(1, follow, "allreduce", TASK, output_dir=str(tmp_path / "a"), **settings)
    (other,) = pool.world(1, follow, "async", TASK, output_dir=str(tmp_path / "b"), **settings)
    assert first_difference(one.tensors, other.tensors, 1e-6) is None
    assert other.losses == pytest.approx(one.losses, rel=1e-6)


@pytest.mark.parametrize("optim", ["sgd", "adamw", "muon"])
def test_where_nothing_is_stale_it_is_synchronous(pool: Pool, tmp_path: Path, optim: str) -> None:
    """The pushes of all workers are collected, and made at the same parameters."""
    settings = SETTINGS | {"optim": optim, "max_grad_norm": 0.0}
    whole = pool.world(3, follow, "allreduce", TASK, output_dir=str(tmp_path / "a"), **settings)
    gated = settings | {"max_staleness": 0, "collect": 3}
    other = pool.world(3, follow, "async", TASK, output_dir=str(tmp_path / "b"), **gated)
    assert first_difference(whole[0].tensors, other[0].tensors, 1e-10) is None


@pytest.mark.parametrize("share_memory", [False, True])
def test_every_push_is_applied_and_all_end_with_the_same_model(pool: Pool, share_memory: bool) -> None:
    ends = pool.world(3, steps_of, "async", TASK, share_memory=share_memory, servers=2)
    for end in ends:
        assert end.versions == [36, 36]
        assert first_difference([ends[0].final], [end.final]) is None


def test_without_a_bound_nobody_waits(pool: Pool, tmp_path: Path) -> None:
    """Rank 1 is held up until rank 0 has taken all of its steps."""
    first, last = pool.world(2, steps_of, "async", TASK, held_up=tmp_path)
    assert max(last.staleness) >= 12 - 5
    assert max(first.staleness) <= 6
    assert first_difference([first.final], [last.final]) is None


@pytest.mark.parametrize(("max_staleness", "updates"), [(0, 1), (1, 3)])
def test_the_bound_holds(pool: Pool, max_staleness: int, updates: int) -> None:
    """Of two workers: at 0 the other's push of this step; at 1 one of its own on the way and two of the other."""
    for end in pool.world(2, steps_of, "async", TASK, max_steps=40, max_staleness=max_staleness):
        assert max(end.staleness) <= updates


def test_workers_are_told_the_others_numbers(pool: Pool) -> None:
    """With a bound, for without one a worker may have done all of its steps before another has begun."""
    for end in pool.world(3, steps_of, "async", TASK, max_staleness=2):
        assert end.numbers[0] <= 3
        assert end.numbers[-1] == 3


@asks(10, "async")
@pytest.mark.parametrize("max_staleness", [None, 0, 2])
def test_a_dead_worker_does_not_stop_the_others(pool: Pool, max_staleness: int | None) -> None:
    started = pool.start(steps_of, "async", TASK, ranks=3, killed=2, max_staleness=max_staleness)
    *left, dead = pool.wait(started)
    assert dead.code == -9
    assert [outcome.code for outcome in left] == [0, 0], left
    assert first_difference([left[0].value.final], [left[1].value.final]) is None
    assert left[0].value.versions[0] in (2 * 12 + 5, 2 * 12 + 4)
    assert left[0].output.count("server: worker 2 is gone after step") == 1
    assert left[0].output.endswith(("go on\n", "none is left\n")), "these may be done before it is noticed"
