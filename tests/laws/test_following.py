"""Law 3: N replicas follow one. Law 4: they agree after every step."""

from pathlib import Path
from typing import Any

import numpy as np
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import STRATEGIES, each_that_keeps
from laws.worlds import Record, first_difference, follow

STEPS = 50
TASK = RowsTask("tied", dropout=0.1)
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "global_batch_size": 12, "per_device_train_batch_size": 2, "learning_rate": 0.01,
    "bucket_mb": 0.004, "seed": 3,
}  # fmt: skip


def one_replica(pool: Pool, folder: Path, strategy: str, precision: str) -> Record:
    settings = SETTINGS | {"precision": precision, "output_dir": str(folder / "one")}
    return pool.world(1, follow, strategy, TASK, **settings)[0]


@each_that_keeps(3)
def test_replicas_follow_one(pool: Pool, tmp_path: Path, strategy: str) -> None:
    """In float64 up to rounding; what is exact, in bf16 to the last bit."""
    exact = STRATEGIES[strategy].exact
    precision = "bf16-mixed" if exact else "64-true"
    tolerance = 0.0 if exact else 1e-9
    one = one_replica(pool, tmp_path, strategy, precision)
    assert len(one.losses) == STEPS
    assert one.losses[-1] < one.losses[0]
    for ranks in (2, 3, 4):
        settings = SETTINGS | {"precision": precision, "output_dir": str(tmp_path / str(ranks))}
        records = pool.world(ranks, follow, strategy, TASK, **settings)
        assert first_difference(one.tensors, records[0].tensors, tolerance) is None
        np.testing.assert_allclose(records[0].losses, one.losses, rtol=tolerance)
        if 4 in STRATEGIES[strategy].laws:
            for record in records[1:]:
                assert first_difference(records[0].tensors, record.tensors) is None


@each_that_keeps(3, exact=True)
def test_shares_that_change_while_running_change_nothing(pool: Pool, tmp_path: Path, strategy: str) -> None:
    one = one_replica(pool, tmp_path, strategy, "32-true")
    settings = SETTINGS | {"precision": "32-true", "output_dir": str(tmp_path / "moving")}
    records = pool.world(3, follow_with_moving_shares, strategy, TASK, **settings)
    assert first_difference(one.tensors, records[0].tensors) is None
    assert records[0].losses == one.losses


def follow_with_moving_shares(mesh: Any, strategy: str, task: RowsTask, **settings: Any) -> Record:
    """As `follow`, where the balancer finds another rank slow after every step."""
    from shoal import shares
    from shoal.training import balance

    moves = iter(np.random.default_rng(1).integers(1, 9, (STEPS + 1, 3)).tolist())
    balance.Balancer.observe = lambda self, held, seconds: shares.proportional(sum(held.counts), next(moves))
    return follow(mesh, strategy, task, balance="auto", **settings)


def test_the_first_step_and_tensor_that_differ_are_named() -> None:
    runs = [[{"a": np.ones(2), "b": np.zeros(3)} for _ in range(4)] for _ in range(2)]
    assert first_difference(*runs) is None
    runs[1][2]["b"][1] = 1e-12
    runs[1][3]["a"][0] = 5
    assert str(first_difference(*runs)).startswith("step 2, tensor b: differs by 1e-12")
    runs[1][2]["b"][1] = np.nan
    assert "step 2, tensor b" in str(first_difference(*runs, 1e-3))
    assert first_difference(runs[0], runs[0][:3]) == "4 steps against 3"
