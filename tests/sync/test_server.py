"""The strategy `server` on real processes."""

from pathlib import Path
from typing import Any

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow
from sync.central_worlds import SETTINGS, steps_of

TASK = RowsTask("tied", dropout=0.1)


@pytest.mark.parametrize(("ranks", "servers", "optim"), [(2, 1, "adamw"), (3, 2, "sgd"), (3, 3, "muon")])
def test_it_is_all_reduce_to_rounding(
    pool: Pool, tmp_path: Path, ranks: int, servers: int, optim: str
) -> None:
    settings = SETTINGS | {"optim": optim}
    one = pool.world(ranks, follow, "allreduce", TASK, output_dir=str(tmp_path / "a"), **settings)
    other = pool.world(
        ranks, follow, "server", TASK, output_dir=str(tmp_path / "b"), servers=servers, **settings
    )
    for record in other:
        assert first_difference(one[0].tensors, record.tensors, 1e-9) is None
        assert first_difference(other[0].tensors, record.tensors) is None
    assert other[0].losses == pytest.approx(one[0].losses, rel=1e-9)


def with_a_death(pool: Pool, strategy: str, **settings: Any) -> list[Any]:
    return pool.wait(pool.start(steps_of, strategy, TASK, ranks=3, killed=2, **settings))


@pytest.mark.parametrize("servers", [1, 2])
def test_a_quorum_survives_a_dead_worker(pool: Pool, servers: int) -> None:
    *left, dead = with_a_death(pool, "server", quorum=2, servers=servers)
    assert dead.code == -9
    assert [outcome.code for outcome in left] == [0, 0], left
    assert first_difference([left[0].value.final], [left[1].value.final]) is None
    assert left[0].output.count("server: worker 2 is gone after step") == 1
    assert left[0].output.endswith(": 2 go on\n")


def test_without_a_quorum_a_dead_worker_ends_all(pool: Pool) -> None:
    *left, dead = with_a_death(pool, "server")
    assert dead.code == -9
    why = "2 of 3 workers are left at step 6, and an update needs 3; a lower --quorum"
    assert why in left[0].error
    assert (
        why in left[1].error or "the parameter server in rank 0 is gone" in left[1].error
    )  # it ends at once
    assert "the others cannot go on" in left[0].output


@pytest.mark.parametrize("chosen", [{"strategy": "server", "quorum": 2}, {"strategy": "async"}])
def test_a_dead_server_is_one_clear_error(pool: Pool, chosen: dict[str, Any]) -> None:
    started = pool.start(steps_of, task=TASK, ranks=3, killed=1, servers=2, max_steps=2000, **chosen)
    first, dead, last = pool.wait(started)
    assert dead.code == -9
    assert "the parameter server in rank 1 is gone" in last.error
    assert first.code == last.code == 1  # the first may learn of the others' end before it misses the server


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize(("strategy", "servers"), [("server", 1), ("server", 2), ("async", 2)])
def test_predicted_bytes_are_sent(pool: Pool, strategy: str, servers: int, codec: str) -> None:
    """Law 9, rank by rank. Asynchronous ones may be on their way when a step ends: only their sum is known."""
    settings = {"servers": servers, "codec": codec, "max_steps": 4, "share_memory": codec == "int8"}
    for end in pool.world(3, steps_of, strategy, TASK, **settings):
        assert sum(end.bytes_sent) == 4 * end.predicted + end.last
        assert strategy == "async" or set(end.bytes_sent[:-1]) == {end.predicted}
        assert end.predicted > 0
