"""1-bit Adam is its published rule, played by one process in NumPy and float64: law 6 of codec and optimizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from laws.pool import Pool
from laws.rows import IGNORED, RowsTask
from laws.worlds import Arrays, first_difference, follow
from reference import TwoStages, signs
from torch.nn import functional as F

from shoal.data.batches import Batches

STEPS, WARMUP, EACH, ROWS, RATE, SEED, BLOCK = 20, 8, 2, 12, 0.02, 3, 16
BETA1, BETA2, EPS, DECAY = 0.8, 0.95, 1e-8, 0.1
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "global_batch_size": ROWS, "per_device_train_batch_size": EACH, "learning_rate": RATE,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": DECAY,
    "precision": "64-true", "bucket_mb": 1e-6, "balance": "off", "seed": SEED, "optim": "onebit-adam",
    "codec": "sign", "codec_momentum": BETA1, "codec_warmup": WARMUP, "block": BLOCK,
}  # fmt: skip


def followed(mesh: Any, task: RowsTask, **settings: Any) -> list[Arrays]:
    """Every parameter after each step of a run."""
    return follow(mesh, "allreduce", task, **settings).tensors


def published(task: RowsTask, ranks: int) -> list[Arrays]:
    """Tang et al. 2021, algorithm 1, after a warm-up by AdamW as it is written in its paper."""
    samples = task.samples("train")
    order = Batches(samples, seed=SEED, global_batch_size=ROWS, micro_batch_size=EACH)
    model = task.model().double()
    params = dict(model.named_parameters())
    sums = {name: TwoStages(signs(BLOCK), feedback=True) for name in params}
    m = {name: np.zeros(p.numel()) for name, p in params.items()}
    v = {name: np.zeros(p.numel()) for name, p in params.items()}
    history = []
    for step in range(STEPS):
        batches = [samples.collate(ids) for ids in order.at(step).ids]
        labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        each = len(batches) // ranks
        parts: list[dict[str, np.ndarray]] = []
        for rank in range(ranks):
            model.zero_grad()
            for batch in batches[rank * each : (rank + 1) * each]:
                scores, target = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
                loss = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
                (loss / labels).backward()
            parts.append({n: p.grad.flatten().numpy().copy() for n, p in params.items()})
        t = step + 1
        for name, p in params.items():
            mine = [part[name] for part in parts]
            if step < WARMUP:
                g = np.sum(mine, axis=0)
                m[name] = BETA1 * m[name] + (1 - BETA1) * g
                v[name] = BETA2 * v[name] + (1 - BETA2) * g * g
            else:
                m[name] = sums[name].sum([BETA1 * m[name] / ranks + (1 - BETA1) * g for g in mine])
            spread = np.sqrt(v[name] / (1 - BETA2 ** min(t, WARMUP))) + EPS
            x = p.detach().numpy().reshape(-1)
            x *= 1 - RATE * (DECAY if p.dim() >= 2 else 0)
            x -= RATE / (1 - BETA1 ** min(t, WARMUP)) * m[name] / spread
        history.append({name: p.detach().numpy().copy() for name, p in params.items()})
    return history


def test_it_is_the_published_rule(pool: Pool, tmp_path: Path) -> None:
    task = RowsTask("tied")
    expected = published(task, 2)
    for found in pool.world(2, followed, task, output_dir=str(tmp_path), **SETTINGS):
        assert first_difference(expected, found, 1e-10) is None


def test_interrupted_it_goes_on_to_the_last_bit(pool: Pool, tmp_path: Path) -> None:
    """Stopped within the warm-up and after it."""
    task = RowsTask("tied")
    whole = pool.world(2, followed, task, output_dir=str(tmp_path / "whole"), **SETTINGS)
    for stop in (WARMUP - 3, WARMUP + 3):
        again = SETTINGS | {"output_dir": str(tmp_path / str(stop)), "resume_from_checkpoint": "latest"}
        pool.world(2, followed, task, stop_after=stop, **again)
        for one, other in zip(whole, pool.world(2, followed, task, **again), strict=True):
            assert first_difference(one[stop:], other) is None


def test_from_a_checkpoint_of_adamw_the_warm_up_begins_anew(pool: Pool, tmp_path: Path) -> None:
    """The second moment goes on, what the codec hands on begins: nothing jumps."""
    task = RowsTask("tied")
    plain = {"optim": "adamw", "codec": "none", "codec_momentum": 0.0, "codec_warmup": 0, "block": None}
    before = SETTINGS | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    pool.world(2, followed, task, stop_after=5, **before | plain)
    (one, _) = pool.world(2, followed, task, **before)
    largest = max(
        np.abs(a["embed.weight"] - b["embed.weight"]).max() for a, b in zip(one[1:], one, strict=False)
    )
    assert largest < 3 * RATE
    assert torch.isfinite(torch.tensor(one[-1]["embed.weight"])).all()
