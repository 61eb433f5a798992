"""float16 with a loss scale: one decision for all who update by one gradient, followed and resumed exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import after, first_difference, follow, gradient, parameters, run_of

from shoal.errors import ShoalError
from shoal.tensors import loss_scale
from shoal.tensors.precision import resolve
from shoal.training.loop import train
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

STEPS = {"precision": "16-mixed", "global_batch_size": 12, "per_device_train_batch_size": 2, "balance": "off"}
CODEC = {"codec": "int8", "error_feedback": True}
# A strategy, the ranks it is tried on, how many of them hold a replica, its settings; and whether all hold one scale.
CASES: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "allreduce": ("allreduce", 2, {}, True),
    "exact": ("allreduce-exact", 2, {}, True),
    "codec": ("allreduce", 2, CODEC, True),
    "zero1": ("allreduce", 2, {"zero_stage": 1}, True),
    "zero3": ("allreduce", 2, {"zero_stage": 3}, True),
    "hybrid": ("allreduce", 4, {"dp_replicate": 2, "zero_stage": 2}, True),
    "demo": ("demo", 2, {}, True),
    "server": ("server", 2, {}, True),
    "local": ("local", 2, {"sync_every": 3}, False),
    "diloco-of-islands": ("diloco", 4, {"dp_replicate": 2, "zero_stage": 3, "sync_every": 3}, False),
}


def overflow(run: Run, rank: int, step: int) -> None:
    """Have the float16 gradients of one micro-batch of `rank` at `step` overflow: by a loss that is too large."""
    loss = run.replica.placed._loss

    def too_large(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        once = run.mesh.rank == rank and run.progress.step == step
        return loss(model, inputs) * (1e30 if once else 1.0)

    run.replica.placed._loss = too_large


def scales(
    mesh: Mesh, row: str, task: RowsTask, **settings: Any
) -> tuple[list[float], list[bool], list[Any]]:
    """The scale after each of 8 steps, with an overflow on rank 1 at step 3; which were skipped; the parameters."""
    loss_scale.GROWTH_INTERVAL = 3
    run = run_of(mesh, row, task, max_steps=8, **settings)
    overflow(run, rank=1, step=3)
    found: list[float] = []
    skipped: list[bool] = []
    held: list[Any] = []
    after(run, "commit", lambda *_: found.append(run.replica.scaler.scale))
    after(run, "commit", lambda batch, taken, loss: skipped.append(taken.skipped))
    after(run, "commit", lambda *_: held.append(parameters(run)))
    train(run, lambda: False)
    assert run.progress.nonfinite_steps == 0
    return found, skipped, held


@pytest.mark.parametrize("case", CASES)
def test_who_updates_by_one_gradient_holds_one_scale(pool: Pool, case: str, tmp_path: Path) -> None:
    row, ranks, settings, together = CASES[case]
    island = ranks // settings.get("dp_replicate", 1 if settings.get("zero_stage") else ranks)
    found = pool.world(ranks, scales, row, RowsTask("stacked"), output_dir=str(tmp_path), **STEPS, **settings)
    first = 2.0**16
    undisturbed = [first, first, 2 * first, 2 * first, 2 * first, 4 * first, 4 * first, 4 * first]
    overflowed = [first, first, 2 * first, first, first, first, 2 * first, 2 * first]
    for rank, (scale, skipped, held) in enumerate(found):
        hit = together or rank // island == 1 // island
        assert scale == (overflowed if hit else undisturbed), rank
        assert skipped == [hit and step == 3 for step in range(8)]
        stood_still = [first_difference([held[step]], [held[step + 1]]) is None for step in (2, 3)]
        assert stood_still == [hit, False]
        assert all(np.isfinite(array).all() for arrays in held for array in arrays.values())


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_what_is_sent_does_not_depend_on_the_scale(pool: Pool, codec: str) -> None:
    """Unscaled before anything is added or encoded. The scale is a power of two, and leaves float32 bits alone."""
    settings = STEPS | {"codec": codec}
    low, high = (pool.world(2, gradients_at, scale, **settings)[0] for scale in (2.0**4, 2.0**10))
    (whole, *_) = pool.world(2, gradients_at, 1.0, **settings | {"precision": "32-true"})
    largest = max(np.abs(array).max(initial=0.0) for array in whole.values())
    for name in whole:
        for scaled in (low, high):
            assert np.abs(scaled[name] - whole[name]).max(initial=0.0) < 0.03 * largest, name


def gradients_at(mesh: Mesh, scale: float, **settings: Any) -> dict[str, np.ndarray]:
    run = run_of(mesh, "allreduce", RowsTask(), max_steps=1, max_grad_norm=0.0, **settings)
    run.replica.scaler.scale = scale
    return gradient(run)[0]


def follow_growing(mesh: Mesh, row: str, task: RowsTask, **settings: Any) -> Any:
    loss_scale.GROWTH_INTERVAL = 3
    return follow(mesh, row, task, max_steps=8, **settings)


@pytest.mark.parametrize("case", ["exact", "local"])
def test_resumed_as_if_never_stopped(pool: Pool, case: str, tmp_path: Path) -> None:
    """Law 7: the scale and its count of good steps are those of each replica."""
    row, ranks, settings, _ = CASES[case]
    settings = {**STEPS, **settings, "bucket_mb": 0.004}
    task = RowsTask(dropout=0.1)
    whole = pool.world(ranks, follow_growing, row, task, output_dir=str(tmp_path / "whole"), **settings)
    settings["output_dir"] = str(tmp_path / "broken")
    pool.world(ranks, follow_growing, row, task, stop_after=4, **settings)
    ended = pool.world(ranks, follow_growing, row, task, resume_from_checkpoint="latest", **settings)
    for one, other in zip(whole, ended, strict=True):
        assert first_difference(one.tensors[4:], other.tensors) is None
        assert one.progress["scaler"] == other.progress["scaler"] == {"scale": 2.0**18, "good_steps": 2}
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [s["train/loss_scale"] / 2**16 for s in map(json.loads, lines) if "train/loss" in s] == [
        1, 1, 2, 2, 2, 4, 4, 4,
    ]  # fmt: skip


def never_finite(mesh: Mesh, **settings: Any) -> tuple[int, float]:
    run = run_of(mesh, "allreduce", RowsTask(), max_steps=40, **settings)
    loss = run.replica.placed._loss
    run.replica.placed._loss = lambda model, inputs: loss(model, inputs) * float("nan")
    with pytest.raises(ShoalError, match="not finite 3 times"):
        train(run, lambda: False)
    return run.progress.step, run.replica.scaler.scale


def test_a_run_is_given_up_only_at_the_lowest_scale(pool: Pool, tmp_path: Path) -> None:
    """16 halvings from 2^16 to 1 count for nothing; then `max_nonfinite_steps` more end it."""
    found = pool.world(2, never_finite, output_dir=str(tmp_path), **STEPS)
    assert found == [(16 + 3, 1.0)] * 2


def test_the_scale_moves_as_torch_has_it() -> None:
    """Differential: against torch.amp.GradScaler, over a random sequence of overflows."""
    ours = loss_scale.Scaler(resolve("16-mixed", torch.device("cpu")))
    theirs = torch.amp.GradScaler("cpu", growth_interval=5)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    draws = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.1
    interval, loss_scale.GROWTH_INTERVAL = loss_scale.GROWTH_INTERVAL, 5
    try:
        for bad in draws.tolist():
            theirs.scale(weight.sum()).backward()
            weight.grad = weight.grad * (float("inf") if bad else 1.0)
            theirs.step(optimizer)
            theirs.update()
            optimizer.zero_grad()
            ours.update(finite=not bad)
            assert ours.scale == theirs.get_scale()
    finally:
        loss_scale.GROWTH_INTERVAL = interval


def test_the_defaults_are_those_of_torch() -> None:
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == loss_scale.FIRST
    assert theirs.get_growth_factor() == loss_scale.GROWTH
    assert theirs.get_backoff_factor() == loss_scale.BACKOFF
    assert theirs.get_growth_interval() == loss_scale.GROWTH_INTERVAL
