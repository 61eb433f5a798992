"""What the ranks of a world do in these tests, and what they bring back: plain numbers and arrays."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laws.rows import RowsTask
from laws.strategies import STRATEGIES

from shoal.config import load_config
from shoal.errors import Preempted
from shoal.observe.console import Screen
from shoal.tasks import TASKS, Entry
from shoal.training.assemble import assemble
from shoal.training.loop import train
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

Arrays = dict[str, np.ndarray]


@dataclass
class Record:
    """A run as it was: the losses of its steps, and every tensor after each step."""

    losses: list[float]
    tensors: list[Arrays]
    progress: dict[str, Any]
    stopped: bool = False


def run_of(mesh: Mesh, row: str, task: RowsTask, **settings: Any) -> Run:
    """A run of a row of the table, on this rank, as `shoal train` puts it together; with another task."""
    TASKS["rows"] = Entry(lambda config, verbose: Path("rows"), lambda config, folder: task)
    given = {
        "task": "rows",
        "output_dir": "unused",
        "save_steps": 0,
        **STRATEGIES[row].settings,
        **settings,
    }
    return assemble(load_config(None, [], {}, **given).config, mesh, Path("rows"), Screen(speaks=False))


def parameters(run: Run) -> Arrays:
    """A copy of every parameter by name."""
    return {name: as_array(p) for name, p in run.replica.params}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy().copy()


def sent_within(run: Run) -> int:
    """The bytes that this rank has sent to the others of its island."""
    return run.mesh.bytes_sent - run.mesh.wire("replicate").bytes_sent


def gradient(run: Run, step: int = 0) -> tuple[Arrays, float]:
    """The gradients after the replicas have agreed on them, and the loss of the whole step."""
    batch = run.batches.at(step)
    taken = run.replica.gradients(batch)
    run.sync.step(run.replica, taken)
    grads = {name: p.grad.numpy().copy() for name, p in run.replica.params}
    return grads, run.mesh.wire("replicate").sum(taken.losses).sum().item() / batch.labels


def gradients(
    mesh: Mesh, row: str, task: RowsTask, cases: list[dict[str, Any]]
) -> list[tuple[Arrays, float]]:
    """The gradient of step 0 under each of several settings, never clipped."""
    return [gradient(run_of(mesh, row, task, max_grad_norm=0.0, **case)) for case in cases]


def follow(mesh: Mesh, row: str, task: RowsTask, *, stop_after: int | None = None, **settings: Any) -> Record:
    """Train by the loop itself, and record everything. `stop_after`: as if SIGTERM came during that step."""
    run = run_of(mesh, row, task, **settings)
    tensors: list[Arrays] = []
    after(run, "commit", lambda *_: tensors.append(parameters(run)))

    def stop() -> bool:
        return stop_after is not None and run.progress.step + 1 >= stop_after

    stopped = False
    try:
        train(run, stop)
    except Preempted:
        stopped = True
    lines = (run.folder / "metrics.jsonl").read_text().splitlines() if mesh.is_first else []
    losses = [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]
    return Record(losses, tensors, vars(run.progress), stopped)


def after(run: Run, method: str, then: Callable[..., None]) -> None:
    """Call `then` with the same arguments after each call of a method of `run`."""
    original = getattr(run, method)

    def both(*args: Any) -> None:
        original(*args)
        then(*args)

    setattr(run, method, both)


def first_difference(one: list[Arrays], other: list[Arrays], tolerance: float = 0.0) -> str | None:
    """Where two runs part: the first step and tensor that differ by more than `tolerance` of its largest value."""
    if len(one) != len(other):
        return f"{len(one)} steps against {len(other)}"
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.keys() != b.keys():
            return f"step {step}: one lacks {sorted(a.keys() ^ b.keys())}"
        for name in a:
            difference = np.abs(a[name] - b[name]).max(initial=0.0)
            allowed = tolerance * np.abs(a[name]).max(initial=0.0)
            if a[name].shape != b[name].shape or not difference <= allowed:
                return f"step {step}, tensor {name}: differs by {difference:.3g}, allowed {allowed:.3g}"
    return None


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)
