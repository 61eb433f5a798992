"""The same recipe in another precision or under another layout trains the same, to the precision's own rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.layouts import LAYOUTS, Pieces, follow_in_pieces, together
from laws.models import ModelTask
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import Arrays, as_array, first_difference, follow, run_of, sent_within
from torch import nn

from shoal.errors import ShoalError
from shoal.layouts.base import bytes_sent, reduced_dtypes, shape_of
from shoal.optim.optimizers import Hyperparameters
from shoal.optim.rounding import RoundedAdamW, draws, places, round_by_chance
from shoal.tensors.piece import Piece, trained
from shoal.training.loop import train
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

STEPS = {"max_steps": 6, "global_batch_size": 12, "per_device_train_batch_size": 2, "balance": "off"}
# How far the losses of 6 steps may be from those of one float64 process, as a part of them: five to ten times
# what was seen under any layout.
NEAR = {"64-true": 1e-12, "32-true": 1e-6, "16-mixed": 2e-4, "bf16-mixed": 2e-3, "bf16-true": 5e-3}
# Beside the layouts that are cut: whole replicas.
PLACES: dict[str, tuple[int, int, dict[str, Any]]] = {"replicated": (2, 1, {}), **LAYOUTS}
HELD = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


def losses_of(mesh: Mesh, task: RowsTask, folder: str, **settings: Any) -> list[list[float]]:
    """The losses under every precision. The loop asserts at its first step that all is held as the policy says."""
    found = []
    for precision in NEAR:
        settings |= {"precision": precision, "output_dir": f"{folder}/{precision}"}
        found.append(follow_in_pieces(mesh, "allreduce", task, **STEPS, **settings)[0])
    return found


def test_every_precision_under_every_layout(pool: Pool, tmp_path: Path) -> None:
    task = RowsTask("stacked", dropout=0.1)
    settings = {"precision": "64-true", "output_dir": str(tmp_path / "alone")}
    (alone,) = pool.world(1, follow, "allreduce", task, **STEPS, **settings)
    far = {}
    for layout in ("replicated", "zero1", "zero2", "zero3-of-3", "hybrid"):
        ranks, _, cut = PLACES[layout]
        (losses, *_) = pool.world(ranks, losses_of, task, str(tmp_path / layout), **cut)
        for precision, found in zip(NEAR, losses, strict=True):
            far[layout, precision] = np.abs(np.array(found) / alone.losses - 1).max()
    assert not {case: away for case, away in far.items() if not away < NEAR[case[1]]}, far


def test_float8_under_layouts(pool: Pool, tmp_path: Path) -> None:
    """Linear layers see whole weights under every stage of ZeRO, and then the same scales; parts have their own."""
    task, settings = ModelTask("llama"), {**STEPS, "precision": "fp8-mixed"}
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **settings)
    (wide,) = pool.world(
        1, follow, "allreduce", task, output_dir=str(tmp_path / "wide"), **STEPS, precision="32-true"
    )
    away = np.abs(np.array(alone.losses) / wide.losses - 1)
    assert 1e-5 < away.max() < 0.02  # it is another arithmetic, and trains alike
    for layout, near in {
        "replicated": 1e-3,
        "zero1": 1e-3,
        "zero3": 1e-3,
        "hybrid": 1e-3,
        "tp2": 0.01,
    }.items():
        ranks, _, cut = {**PLACES, "tp2": (2, 2, {"tp": 2})}[layout]
        folder = str(tmp_path / layout)
        (losses, *_), *_ = pool.world(
            ranks, follow_in_pieces, "allreduce", task, output_dir=folder, **settings, **cut
        )
        assert np.allclose(losses, alone.losses, rtol=near), layout


def held_otherwise(mesh: Mesh, **settings: Any) -> str:
    run = run_of(mesh, "allreduce", RowsTask(), max_steps=1, **settings)
    run.replica.policy = type(run.replica.policy)(**vars(run.replica.policy) | {"reduction": torch.float16})
    with pytest.raises(ShoalError) as error:
        train(run, lambda: False)
    return str(error.value)


@pytest.mark.parametrize("layout", ["replicated", "zero2"])
def test_the_first_step_finds_what_is_held_otherwise(pool: Pool, layout: str, tmp_path: Path) -> None:
    ranks, _, settings = PLACES[layout]
    for said in pool.world(ranks, held_otherwise, output_dir=str(tmp_path), precision="32-true", **settings):
        assert "sums of gradients in torch.float16, found torch.float32" in said


# Parameters in bfloat16


def of_many(mesh: Mesh, task: RowsTask, **settings: Any) -> Run:
    """A run of one step, in which each sample is a micro-batch."""
    step = {"global_batch_size": task.size, "per_device_train_batch_size": 1, "max_steps": 1}
    return run_of(mesh, "allreduce", task, **step, max_grad_norm=0.0, balance="off", **settings)


def summed_over_many(mesh: Mesh, task: RowsTask, **settings: Any) -> Pieces:
    """The gradient of a step, as this rank hands it to the optimizer; what it sends for it is what is predicted."""
    run = of_many(mesh, task, precision="bf16-true", **settings)
    batch, placed, before = run.batches.at(0), run.replica.placed, sent_within(run)
    taken = run.replica.gradients(batch)
    run.sync.step(run.replica, taken)
    predicted = bytes_sent(placed, run.replica.turns, shape_of(batch.micro_batch(0)))
    assert sent_within(run) - before == predicted
    assert {bucket.flat.dtype for bucket in run.replica.buckets} == {torch.float32}
    assert reduced_dtypes(run.replica.placed) <= {torch.float32}
    return {
        piece.name: (tuple(piece.shape), piece.blocks, as_array(piece.local.grad))
        for piece in trained(run.replica.placed.pieces)
    }


def summed_in_float64(mesh: Mesh, task: RowsTask) -> Arrays:
    """Of plain torch: the same micro-batches' own gradients in bf16."""
    run = of_many(mesh, task)
    batch, model = run.batches.at(0), task.model().bfloat16()
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for v in range(len(batch.ids)):
        model.zero_grad()
        (task.loss(model, batch.micro_batch(v)) / batch.labels).backward()
        for name, p in model.named_parameters():
            sums[name] += 0 if p.grad is None else p.grad
    return {name: as_array(tensor) for name, tensor in sums.items()}


def test_sums_of_many_micro_batches_round_once(pool: Pool) -> None:
    """bf16 parameters: over micro-batches and over ranks as in float64, to half a digit of bf16, under any layout."""
    tasks = {"rows": RowsTask("sometimes", size=512), "tied": ModelTask("qwen3", size=64, full=True)}
    near = {"rows": 2**-9, "tied": 2**-4}  # what is computed in parts rounds activations otherwise
    exact = {name: pool.world(1, summed_in_float64, task)[0] for name, task in tasks.items()}
    far = {}
    for name, kind, ranks, layout in (
        ("replicated", "rows", 2, {}),
        ("zero1", "rows", 2, {"zero_stage": 1}),
        ("zero2", "rows", 2, {"zero_stage": 2}),
        ("tp2", "tied", 2, {"tp": 2}),
        ("pp2", "tied", 2, {"pp": 2}),
    ):
        held = pool.world(ranks, summed_over_many, tasks[kind], **layout)
        found = together(held if layout else held[:1])
        away = {n: np.linalg.norm(found[n] - e) / np.linalg.norm(e) for n, e in exact[kind].items()}
        far |= {(name, n): each for n, each in away.items() if not each <= near[kind]}
    assert not far


def test_rounding_by_chance_is_right_on_average() -> None:
    """The mean of many roundings is the value, to 5 standard errors; each is one of the two neighbours."""
    values = torch.tensor([1.0, 1.0 + 2**-10, -3.1, 1e-20, 0.0, 65504.0, -1e-39])
    index = torch.arange(40_000, dtype=torch.int32)
    rounded = torch.stack([round_by_chance(values, draws(7, index[i : i + 1])) for i in range(len(index))])
    below, above = rounded.min(0).values, rounded.max(0).values
    gap = (above.double() - below.double()).clamp(min=0)
    error = (rounded.double().mean(0) - values.double()).abs()
    assert (error <= 5 * gap / 2 / len(index) ** 0.5).all(), error / gap
    assert (below.float() <= values).all()
    assert (values <= above.float()).all()
    assert ((gap == 0) == (values == values.bfloat16().float())).all()


def test_draws_are_uniform_and_differ_by_key() -> None:
    index = torch.arange(2**16, dtype=torch.int32)
    counts = torch.bincount(draws(1, index) >> 8, minlength=256).double()
    chi_square = ((counts - 256).square() / 256).sum().item()
    assert chi_square < 255 + 5 * 510**0.5
    assert draws(1, index).min() >= 0
    one, other = (draws(key, index).double() for key in (1, 2))
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.02


def test_what_does_not_fit_stays_as_it_is() -> None:
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    rounded = round_by_chance(odd, torch.full((3,), 2**16 - 1, dtype=torch.int32))
    assert rounded.isinf().tolist() == [True, True, False]
    assert rounded.isnan().tolist() == [False, False, True]


def updated(parts: list[tuple[int, ...]], shape: torch.Size, steps: int, rate: float) -> list[torch.Tensor]:
    """A matrix of ones, held in parts (row, column, rows, columns), after some steps of one fixed gradient."""
    gradient = torch.linspace(-1, 2, shape.numel()).view(shape).bfloat16()
    pieces = [
        Piece("w", shape, (row, column), p := nn.Parameter(torch.ones(rows, columns).bfloat16()), p)
        for row, column, rows, columns in parts
    ]
    for piece, (row, column, rows, columns) in zip(pieces, parts, strict=True):
        piece.local.grad = gradient[row : row + rows, column : column + columns].clone()
    for piece in pieces:
        optimizer = RoundedAdamW([piece], Hyperparameters(rate, 0.0), seed=3)
        for _ in range(steps):
            optimizer.step()
    return [piece.local.detach() for piece in pieces]


def test_a_piece_is_rounded_as_the_whole() -> None:
    shape = torch.Size((6, 10))
    (whole,) = updated([(0, 0, 6, 10)], shape, 5, 0.003)
    top, bottom = updated([(0, 0, 4, 10), (4, 0, 2, 10)], shape, 5, 0.003)
    left, right = updated([(0, 0, 6, 3), (0, 3, 6, 7)], shape, 5, 0.003)
    assert torch.equal(whole, torch.cat([top, bottom]))
    assert torch.equal(whole, torch.cat([left, right], dim=1))
    assert whole.unique().numel() > 2


def test_tiny_updates_move_what_the_nearest_would_not() -> None:
    """AdamW moves each weight by about the rate; 100 times 2^-12 is 0.024, and half the gap at 1 is 2^-9 or 2^-8."""
    shape, rate = torch.Size((40, 50)), 2.0**-12
    (moved,) = updated([(0, 0, 40, 50)], shape, 100, rate)
    steps = (moved.float() - 1) / rate
    sign = torch.linspace(-1, 2, shape.numel()).view(shape).sign()
    away = (-sign * steps).mean().item()
    assert abs(away - 100) < 5
    assert torch.equal((torch.ones(shape).bfloat16() - rate * sign).bfloat16(), torch.ones(shape).bfloat16())


def test_places_are_counted_in_the_whole() -> None:
    p = nn.Parameter(torch.zeros(2, 3, 2))
    piece = Piece("w", torch.Size((5, 4, 6)), (1, 1, 3), p, p)
    counted = torch.arange(120).view(5, 4, 6)[1:3, 1:4, 3:5]
    assert torch.equal(places(piece).long(), counted)


def held_in_bf16(mesh: Mesh, task: RowsTask, **settings: Any) -> list[Arrays]:
    return follow(mesh, "allreduce-exact", task, precision="bf16-true", **{**STEPS, **settings}).tensors


def test_bf16_parameters_are_the_same_bits_on_any_worker_count(pool: Pool, tmp_path: Path) -> None:
    """In exact mode, and resumed too."""
    task = RowsTask("tied", dropout=0.1)
    one, two = (
        pool.world(ranks, held_in_bf16, task, output_dir=str(tmp_path / str(ranks))) for ranks in (1, 2)
    )
    assert first_difference(one[0], two[0]) is None
    assert first_difference(two[0], two[1]) is None
    broken = {"output_dir": str(tmp_path / "broken"), "save_steps": 5}
    pool.world(2, held_in_bf16, task, stop_after=5, **broken)
    resumed = pool.world(1, held_in_bf16, task, resume_from_checkpoint="latest", **broken)
    assert first_difference(one[0][5:], resumed[0]) is None


def islands_in_bf16(mesh: Mesh, task: RowsTask, **settings: Any) -> Pieces:
    return follow_in_pieces(mesh, "allreduce", task, precision="bf16-true", **STEPS, **settings)[1][-1]


def test_replicas_of_pieces_in_bf16_agree_in_bits(pool: Pool, tmp_path: Path) -> None:
    _, _, settings = LAYOUTS["hybrid"]
    ranks = pool.world(4, islands_in_bf16, RowsTask("stacked"), output_dir=str(tmp_path), **settings)
    one, other = together(ranks[:2]), together(ranks[2:])
    assert first_difference([one], [other]) is None


def resumed_under(mesh: Mesh, task: RowsTask, precision: str, **settings: Any) -> set[torch.dtype]:
    run = run_of(mesh, "allreduce", task, **STEPS, precision=precision, **settings)
    train(run, lambda: False)
    state = {t.dtype for _, t in run.replica.optimizer_state.tensors() if t.dim()}
    return state | {p.dtype for _, p in run.replica.params}


def test_a_checkpoint_goes_on_under_another_precision(pool: Pool, tmp_path: Path) -> None:
    """Parameters and optimizer state are converted."""
    task = RowsTask("stacked")
    for first in ("32-true", "bf16-true"):
        folder = str(tmp_path / first)
        pool.world(2, follow, "allreduce", task, precision=first, stop_after=4, output_dir=folder, **STEPS)
        for then in NEAR:
            settings = {"resume_from_checkpoint": folder, "output_dir": f"{folder}-{then}"}
            held, *_ = pool.world(2, resumed_under, task, then, **settings)
            assert held == {HELD.get(then, torch.float32)}, (first, then)
