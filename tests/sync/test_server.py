"""The strategy `server` on real processes."""

from pathlib import Path
from typing import Any

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow

SETTINGS: dict[str, Any] = {
    "max_steps": 12, "global_batch_size": 12, "per_device_train_batch_size": 2, "learning_rate": 0.01,
    "bucket_mb": 0.004, "balance": "off", "precision": "64-true",
}  # fmt: skip
TASK = RowsTask("tied", dropout=0.1)


@pytest.mark.parametrize(("ranks", "servers", "optim"), [(3, 2, "sgd"), (2, 1, "adamw"), (3, 3, "muon")])
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
