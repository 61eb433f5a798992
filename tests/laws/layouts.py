"""Training by the loop of replicas that several ranks hold together, and what each rank holds of them."""

from typing import Any

import numpy as np
from laws.rows import RowsTask
from laws.worlds import Arrays, after, as_array, run_of, sent_within

from shoal.layouts.base import bytes_sent, shape_of
from shoal.tensors.piece import Block
from shoal.training.loop import train
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

Pieces = dict[str, tuple[tuple[int, ...], tuple[Block, ...], np.ndarray]]

STEPS = {"precision": "64-true", "max_steps": 4, "global_batch_size": 12, "per_device_train_batch_size": 2}

# Of each layout how many ranks it is tried on, how many of them hold a replica, and how it is asked for.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero1": (2, 2, {"zero_stage": 1}),
    "zero2": (2, 2, {"zero_stage": 2}),
    "zero3": (2, 2, {"zero_stage": 3}),
    "zero3-of-3": (3, 3, {"dp_shard": 3}),
    "hybrid": (4, 2, {"dp_replicate": 2, "zero_stage": 3}),
    "hybrid-zero1": (4, 2, {"dp_shard": 2, "zero_stage": 1}),
}


def pieces_of(run: Run) -> Pieces:
    return {
        piece.name: (tuple(piece.shape), piece.blocks, as_array(piece.local))
        for piece in run.replica.placed.pieces
    }


def follow_in_pieces(
    mesh: Mesh, row: str, task: RowsTask, **settings: Any
) -> tuple[list[float], list[Pieces], dict[str, float]]:
    """Train by the loop: the losses of the steps, this rank's pieces after each, and the last evaluation."""
    run = run_of(mesh, row, task, **settings)
    losses: list[float] = []
    held: list[Pieces] = []
    after(run, "commit", lambda *_: held.append(pieces_of(run)))
    after(run, "commit", lambda batch, step, agreed: losses.append(agreed.loss))
    metrics = train(run, lambda: False)
    return losses, held, metrics


def together(ranks: list[Pieces]) -> Arrays:
    """The whole tensors of the pieces of one island; every element must be held once."""
    found: dict[str, np.ndarray] = {}
    for pieces in ranks:
        for name, (shape, blocks, values) in pieces.items():
            whole = found.setdefault(name, np.full(shape, np.nan))
            for block in blocks:
                where = tuple(slice(o, o + n) for o, n in zip(block.offset, block.size, strict=True))
                assert np.isnan(whole[where]).all(), f"{name} is held twice"
                whole[where] = values[block.where]
    assert not any(np.isnan(whole).any() for whole in found.values())
    return found


def sent_and_predicted(mesh: Mesh, task: RowsTask, **settings: Any) -> list[tuple[int, float]]:
    """Of the first steps: the bytes that this rank sent within its island, and those that it was to send."""
    run = run_of(mesh, "allreduce", task, **settings)
    found = []
    for step in range(3):
        before = sent_within(run)
        batch = run.batches.at(step)
        taken = run.replica.gradients(batch)
        run.sync.step(run.replica, taken)
        predicted = bytes_sent(run.replica.placed, run.replica.turns, shape_of(batch.micro_batch(0)))
        found.append((sent_within(run) - before, predicted))
    return found


def resume_all(
    mesh: Mesh, task: RowsTask, saved: list[str], folder: str, **settings: Any
) -> list[tuple[Pieces, float]]:
    """Go on from each of the runs that were saved, to the end: this rank's pieces and the last loss."""
    found = []
    for number, name in enumerate(saved):
        resumed = {"resume_from_checkpoint": name, "output_dir": f"{folder}-{number}"}
        losses, held, _ = follow_in_pieces(mesh, "allreduce", task, **STEPS, **settings, **resumed)
        found.append((held[-1], losses[-1]))
    return found
