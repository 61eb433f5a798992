"""`shoal evaluate` measures a model without the training around it."""

from pathlib import Path
from typing import Any

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import run_of

from shoal.config import Resolved
from shoal.sync import SYNCS
from shoal.training import assemble, jobs
from shoal.training.evaluate import validate
from shoal.wire.mesh import Mesh

STRATEGIES = ("allreduce", "diloco", "async", "gossip")


def both(mesh: Mesh, strategy: str) -> tuple[Any, Any]:
    """The metrics of a run that has not begun, and those of the command, which makes nothing to train with."""
    run = run_of(mesh, strategy, RowsTask())
    expected = validate(run, lambda: False)

    def made(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an evaluation trains nothing")

    assemble.Buckets = made
    SYNCS[run.config.strategy.name].__init__ = made  # type: ignore[method-assign, assignment]
    found = jobs.evaluate_job(Resolved(run.config, {}), mesh, Path("rows"), lambda: False)  # type: ignore[arg-type]
    return expected, found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_evaluation_builds_no_training(pool: Pool, strategy: str) -> None:
    expected, found = pool.world(2, both, strategy)[0]
    assert found == expected
