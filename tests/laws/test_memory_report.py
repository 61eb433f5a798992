"""Law 9 of what is held: parts of a replica measured at the peak of a step are those of the formula, to the byte."""

from typing import Any

import pytest
from laws.deep import DeepTask, narrow_inside
from laws.pool import Pool
from laws.worlds import run_of

from shoal.observe.memory import ACTIVATIONS, Report
from shoal.wire.mesh import Mesh

STEPS = {"precision": "32-true", "max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 4}
EXACT = ("parameters", "gradients", "optimizer state")


def reports(mesh: Mesh, folder: str, cases: list[dict[str, Any]]) -> list[Report]:
    """The report of this rank under each of several settings."""
    found = []
    for case in cases:
        run = run_of(
            mesh,
            "allreduce",
            DeepTask(depth=4, layer=narrow_inside),
            memory_report=True,
            output_dir=folder,
            **STEPS,
            **case,
        )
        run.folder.mkdir(exist_ok=True)
        for step in range(2):
            batch = run.batches.at(step)
            with run.memory.watching(step):
                taken = run.replica.gradients(batch)
                run.sync.step(run.replica, taken)
        assert run.memory.report is not None
        found.append(run.memory.report)
    return found


CASES: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": "full"},
    {"zero_stage": 3},
    {"zero_stage": 1},
    {"optim": "adamw-8bit"},
    {"zero_stage": 3, "optim": "adamw-8bit"},
]


@pytest.fixture(scope="module")
def measured(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[list[Report]]:
    return pool.world(2, reports, str(tmp_path_factory.mktemp("reports")), CASES)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_parts_are_those_of_the_formula(measured: list[list[Report]], case: int) -> None:
    for on_rank in measured:
        for part in EXACT:
            assert on_rank[case][part]["bytes"] == on_rank[case][part]["formula"], part
        gathered = on_rank[case]["gathered for the island"]
        assert (gathered["bytes"] or 0) <= (gathered["formula"] or 0)


def test_computed_again_activations_are_not_held(measured: list[list[Report]]) -> None:
    for on_rank in measured:
        plain, again = (each[ACTIVATIONS]["bytes"] or 0 for each in on_rank[:2])
        assert 0 < again < plain
