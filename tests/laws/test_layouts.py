"""Laws 2, 3, 4 and 8 for replicas that several ranks hold together: they follow one process in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import Arrays, _after, first_difference, follow, run_of

from shoal.loop import train
from shoal.mesh import Mesh
from shoal.run import Run

Pieces = dict[str, tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]
STEPS = {"precision": "64-true", "max_steps": 6, "global_batch_size": 12, "per_device_train_batch_size": 2}
# Of each layout the ranks it needs at least, and how it is asked for.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "zero3-of-3": (3, {"dp_shard": 3}),
    "hybrid": (4, {"dp_replicate": 2, "zero_stage": 3}),
    "hybrid-zero1": (4, {"dp_shard": 2, "zero_stage": 1}),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def pieces_of(run: Run) -> Pieces:
    return {
        piece.name: (tuple(piece.shape), piece.offset, piece.local.detach().numpy().copy())
        for piece in run.replica.placed.pieces
    }


def follow_in_pieces(
    mesh: Mesh, row: str, task: RowsTask, **settings: Any
) -> tuple[list[float], list[Pieces], dict[str, float]]:
    """Train by the loop: the losses of the steps, this rank's pieces after each, and the last evaluation."""
    run = run_of(mesh, row, task, **settings)
    losses: list[float] = []
    held: list[Pieces] = []
    _after(run, "commit", lambda *_: held.append(pieces_of(run)))
    original = run.commit

    def commit(batch: Any, loss: float) -> None:
        losses.append(loss)
        original(batch, loss)

    run.commit = commit  # type: ignore[method-assign]
    metrics = train(run, lambda: False)
    return losses, held, metrics


def together(ranks: list[Pieces]) -> Arrays:
    """The whole tensors of the pieces of one island; every element must be held once."""
    found: dict[str, np.ndarray] = {}
    for pieces in ranks:
        for name, (shape, offset, values) in pieces.items():
            whole = found.setdefault(name, np.full(shape, np.nan))
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            assert np.isnan(whole[where]).all(), f"{name} is held twice"
            whole[where] = values
    assert not any(np.isnan(whole).any() for whole in found.values())
    return found


@pytest.mark.parametrize("kind", ["stacked", "tied", "frozen", "unused", "sometimes"])
@each_layout
def test_a_cut_replica_follows_one_process(pool: Pool, layout: str, kind: str, tmp_path: Path) -> None:
    ranks, settings = LAYOUTS[layout]
    task = RowsTask(kind, dropout=0.1)
    alone = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **STEPS)[0]
    cut = pool.world(
        ranks, follow_in_pieces, "allreduce", task, output_dir=str(tmp_path / "cut"), **STEPS, **settings
    )
    shard = ranks // settings.get("dp_replicate", 1) if "dp_shard" not in settings else settings["dp_shard"]
    for first in range(0, ranks, shard):
        island = cut[first : first + shard]
        whole = [together([held[step] for _, held, _ in island]) for step in range(6)]
        trained = [{name: step[name] for name in alone.tensors[0]} for step in whole]
        assert first_difference(alone.tensors, trained, 1e-10) is None
        for losses, _, _ in island:
            assert np.allclose(losses, alone.losses, rtol=1e-11)
    assert len({metrics["eval/loss"] for _, _, metrics in cut}) == 1


def test_the_pieces_do_not_fit_where_a_rank_computes_otherwise() -> None:
    """The law above can fail: two ranks that hold the same rows are found."""
    piece = ((4,), (0,), np.zeros(2))
    with pytest.raises(AssertionError, match="twice"):
        together([{"a": piece}, {"a": piece}])


def test_torch_is_there() -> None:
    assert torch.distributed.is_available()
