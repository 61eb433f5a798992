"""Law 8: a checkpoint of any pair of layout and strategy loads under any other, at another world size too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws.layouts import STEPS, pieces_of, together
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import Arrays, first_difference, run_of

from shoal.training.loop import train
from shoal.wire.mesh import Mesh

TASK = RowsTask("stacked")
CUT: dict[str, Any] = {"zero_stage": 3}
SAVED = 4  # steps
MORE = STEPS | {"max_steps": SAVED + 3}


@pytest.fixture(scope="module")
def cut(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of replicas that two ranks hold together."""
    folder = tmp_path_factory.mktemp("cut")
    pool.world(2, trained, "allreduce", str(folder), CUT)
    return folder / f"checkpoint-{SAVED}"


def trained(mesh: Mesh, row: str, folder: str, settings: dict[str, Any]) -> None:
    run = run_of(mesh, row, TASK, output_dir=folder, **STEPS | settings)
    train(run, lambda: False)


def loaded(mesh: Mesh, row: str, folders: list[str], aside: str, settings: dict[str, Any]) -> list[Any]:
    """Of each checkpoint what this rank holds of the model before and after some more steps."""
    found = []
    for number, folder in enumerate(folders):
        given = MORE | {"resume_from_checkpoint": folder, "output_dir": f"{aside}-{number}"} | settings
        run = run_of(mesh, row, TASK, **given)
        before = pieces_of(run)
        train(run, lambda: False)
        found.append((before, pieces_of(run), run.progress.step))
    return found


def model_in(checkpoint: Path) -> Arrays:
    from shoal.tensors.tensor_files import Stored

    weights = Stored(checkpoint / "model")
    return {name: weights.read(name).numpy() for name in weights.shapes}


@each_that_keeps(8)
def test_saved_under_one_pair_and_loaded_under_another(
    pool: Pool, tmp_path: Path, cut: Path, strategy: str
) -> None:
    """Each run begins with the model that was saved, on every rank, and trains on."""
    pool.world(2, trained, strategy, str(tmp_path / "own"), {})
    own = tmp_path / "own" / f"checkpoint-{SAVED}"
    on_three = pool.world(3, loaded, strategy, [str(own), str(cut)], str(tmp_path / "three"), {})
    on_islands = pool.world(2, loaded, "allreduce", [str(own)], str(tmp_path / "island"), CUT)
    for number, checkpoint in enumerate((own, cut)):
        for rank in on_three:
            before, after, steps = rank[number]
            moved(model_in(checkpoint), together([before]), together([after]))
            assert steps == SAVED + 3
    before, after = (together([rank[0][when] for rank in on_islands]) for when in (0, 1))
    moved(model_in(own), before, after)


def moved(saved: Arrays, before: Arrays, after: Arrays) -> None:
    """A run has begun with what was saved, and has trained on."""
    assert first_difference([saved], [{name: before[name] for name in saved}]) is None
    assert all(np.isfinite(values).all() for values in after.values())
    assert any(not np.array_equal(before[name], after[name]) for name in before)
