"""Activations that are computed again change no bit, of whole replicas and of cut ones, and no name."""

from pathlib import Path
from typing import Any

import pytest
from laws.layouts import LAYOUTS, follow_in_pieces
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference

from shoal.wire.mesh import Mesh

TASK = RowsTask("stacked", dropout=0.1)
STEPS = {"max_steps": 4, "global_batch_size": 8, "per_device_train_batch_size": 2, "balance": "off"}
RECOMPUTED = {"replicated": (2, 1, {}), **{name: LAYOUTS[name] for name in ("zero1", "zero2", "zero3")}}


def train_each(mesh: Mesh, folder: str, **settings: Any) -> list[Any]:
    return [
        follow_in_pieces(
            mesh,
            "allreduce",
            TASK,
            output_dir=f"{folder}/{which}",
            gradient_checkpointing=which,
            **STEPS,
            **settings,
        )
        for which in ("none", "full", "selective")
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", RECOMPUTED)
def test_what_is_computed_again_is_the_same(pool: Pool, layout: str, precision: str, tmp_path: Path) -> None:
    ranks, _, settings = RECOMPUTED[layout]
    for plain, *again in pool.world(ranks, train_each, str(tmp_path), precision=precision, **settings):
        for losses, held, metrics in again:
            assert (losses, metrics) == (plain[0], plain[2])
            before, after = (
                [{name: values for name, (*_, values) in step.items()} for step in steps]
                for steps in (plain[1], held)
            )
            assert first_difference(before, after) is None
