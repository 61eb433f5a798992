"""A step of which no row has a label is a step like any other: nothing to divide by zero."""

import math
from pathlib import Path

import pytest
from laws.launches import steps_of
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import follow


@pytest.mark.parametrize("ranks", [1, 2])
@each_that_keeps(10)
def test_steps_without_labels_end_in_no_error(pool: Pool, tmp_path: Path, strategy: str, ranks: int) -> None:
    settings = {"max_steps": 3, "global_batch_size": 4, "per_device_train_batch_size": 2}
    task = RowsTask(unlabelled=True)
    record = pool.world(ranks, follow, strategy, task, output_dir=str(tmp_path), **settings)[0]
    assert record.progress["tokens"] == 0
    assert len(steps_of(tmp_path)) == 3
    assert all(math.isfinite(step["train/loss"]) for step in steps_of(tmp_path))
