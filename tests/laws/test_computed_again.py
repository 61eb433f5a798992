"""Activations that are computed again change no bit, of whole replicas and of cut ones, and no name."""

from pathlib import Path

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.test_layouts import LAYOUTS, follow_in_pieces
from laws.worlds import first_difference

TASK = RowsTask("stacked", dropout=0.1)
STEPS = {"max_steps": 4, "global_batch_size": 8, "per_device_train_batch_size": 2, "balance": "off"}
RECOMPUTED = {"replicated": (2, 1, {}), **{name: LAYOUTS[name] for name in ("zero1", "zero2", "zero3")}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", RECOMPUTED)
def test_what_is_computed_again_is_the_same(pool: Pool, layout: str, precision: str, tmp_path: Path) -> None:
    ranks, _, settings = RECOMPUTED[layout]

    def train(which: str) -> list[tuple[list[float], list[dict[str, object]], dict[str, float]]]:
        folder = str(tmp_path / which)
        return pool.world(
            ranks, follow_in_pieces, "allreduce", TASK,
            output_dir=folder, gradient_checkpointing=which, precision=precision, **STEPS, **settings,
        )  # fmt: skip

    plain = train("none")
    for which in ("full", "selective"):
        for (losses, held, metrics), (others, pieces, measured) in zip(plain, train(which), strict=True):
            assert (losses, metrics) == (others, measured)
            arrays = [{name: values for name, (_, _, values) in step.items()} for step in held]
            again = [{name: values for name, (_, _, values) in step.items()} for step in pieces]
            assert first_difference(arrays, again) is None
