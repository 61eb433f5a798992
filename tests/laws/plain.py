"""Training as anyone would write it in plain PyTorch: what the laws compare with."""

import math
from typing import Any

import torch
from laws.rows import IGNORED, RowsTask
from laws.worlds import Arrays, Record
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


def at_once(task: RowsTask, seed: int, rows: int) -> tuple[Arrays, float]:
    """The gradient and loss of the whole batch of step 0 by one backward pass of plain PyTorch, in float64."""
    samples = task.samples("train")
    ids = Batches(samples, seed=seed, global_batch_size=rows, micro_batch_size=rows).at(0).ids
    (batch,) = map(samples.collate, ids)
    model = task.model().double()
    labels = batch["labels"].flatten()
    loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), labels, ignore_index=IGNORED)
    loss.backward()
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for n, p in params}, loss.item()
