"""Law 1: one replica equals plain PyTorch, bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.pool import Pool
from laws.rows import IGNORED, RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import Record, first_difference, follow
from torch.nn import functional as F

from shoal.data.batches import Batches
from shoal.data.order import derive_seed

STEPS, SEED, RATE, WARMUP = 12, 5, 0.01, 3


def by_hand(task: RowsTask, dtype: torch.dtype, autocast: bool) -> Record:
    """The loop as anyone would write it. Only the order of the data and the seeds of dropout are shoal's.

    (Three micro-batches a step: the order in which a plain loop adds them is then also that of the exact tree.)
    """
    samples = task.samples("train")
    order = Batches(samples, seed=SEED, global_batch_size=12, micro_batch_size=4)
    model = task.model().to(dtype).train()
    params = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses, tensors = [], []
    for step in range(STEPS):
        micro_batches = [samples.collate(ids) for ids in order.at(step).ids]
        labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        total = 0.0
        for v, batch in enumerate(micro_batches):
            torch.manual_seed(derive_seed(SEED, "dropout", step, v))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                scores = model(batch["tokens"])
                wide = scores.flatten(0, 1).to(torch.promote_types(scores.dtype, torch.float32))
                loss = F.cross_entropy(wide, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
            (loss / labels).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1) / WARMUP if step < WARMUP else RATE * decay
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / labels)
        tensors.append({n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad})
    return Record(losses, tensors, {})


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
