"""What travels beside the next steps: every round of a codec is started while they are computed."""

from pathlib import Path
from typing import Any

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import run_of

from shoal.training.loop import train
from shoal.wire.mesh import Mesh
from shoal.wire.wire import Wire

EVERY, OVERLAP = 6, 5
STARTS = ("start_exchange", "start_all_gather", "start_all_reduce")


def started(mesh: Mesh, **settings: Any) -> list[tuple[int, str]]:
    """After which step the first sync starts which exchange of a large tensor."""
    run = run_of(
        mesh, "diloco", RowsTask(), sync_every=EVERY, overlap_steps=OVERLAP, max_steps=12, **settings
    )
    found: list[tuple[int, str]] = []

    def watched(name: str, original: Any) -> Any:
        def start(wire: Wire, *tensors: Any, **named: Any) -> Any:
            if (
                wire is run.mesh.wire("replicate")
                and not isinstance(tensors[0], list)
                and tensors[0].numel() > 64
            ):
                found.append((run.progress.step + 1, name))
            return original(wire, *tensors, **named)

        return start

    with pytest.MonkeyPatch.context() as patched:
        for name in STARTS:
            patched.setattr(Wire, name, watched(name, getattr(Wire, name)))
        train(run, lambda: False)
    return [each for each in found if each[0] < 2 * EVERY]


@pytest.mark.parametrize(
    ("codec", "rounds"),
    [
        ("int8", [(EVERY, "start_exchange"), (EVERY + 3, "start_all_gather")]),
        ("powersgd", [(EVERY, "start_all_reduce"), (EVERY + 3, "start_all_reduce")]),
        ("topk", [(EVERY, "start_all_gather")]),
    ],
)
def test_every_round_has_its_part_of_the_way(
    pool: Pool, tmp_path: Path, codec: str, rounds: list[tuple[int, str]]
) -> None:
    settings = {"codec": codec, "output_dir": str(tmp_path), "balance": "off"}
    if codec == "powersgd":
        settings["rank"] = 2
    batch = {"global_batch_size": 4, "per_device_train_batch_size": 1}
    for found in pool.world(2, started, **settings, **batch):
        assert found == rounds
