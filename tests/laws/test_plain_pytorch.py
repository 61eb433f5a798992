"""Law 1: one replica equals plain PyTorch, bit for bit."""

from pathlib import Path

import pytest
import torch
from laws.plain import RATE, SEED, STEPS, WARMUP, by_hand
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import first_difference, follow


@pytest.mark.parametrize("kind", ["plain", "tied", "sometimes", "frozen"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@each_that_keeps(1)
def test_one_replica_equals_a_plain_loop(
    pool: Pool, tmp_path: Path, strategy: str, precision: str, kind: str
) -> None:
    task = RowsTask(kind, dropout=0.1)
    settings = {
        "output_dir": str(tmp_path), "precision": precision, "seed": SEED, "max_steps": STEPS,
        "learning_rate": RATE, "warmup_steps": WARMUP, "weight_decay": 0.1, "max_grad_norm": 1.0,
        "global_batch_size": 12, "per_device_train_batch_size": 4, "bucket_mb": 0.001,
    }  # fmt: skip
    dtype = torch.float64 if precision == "64-true" else torch.float32
    plain = pool.alone(by_hand, task, dtype, precision == "bf16-mixed").value
    (ours,) = pool.world(1, follow, strategy, task, **settings)
    assert first_difference(plain.tensors, ours.tensors) is None
    assert plain.losses == ours.losses
