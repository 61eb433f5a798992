"""The guard acts where a strategy goes astray, and only there."""

import json
from pathlib import Path
from typing import Any

import pytest
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import follow, run_of
from simulator import Simulator
from sync.server_rules import serve
from torch import Tensor

from shoal.config import load_config
from shoal.cost import Cost, Sizes
from shoal.servers.update_rules import Arrivals
from shoal.sync.base import Guardable, Sync
from shoal.sync.guard import Guard
from shoal.sync.members import Members
from shoal.wire.mesh import Mesh
from shoal.wire.wire import Wire

WORKERS, RATE, STEPS = 8, 1.2, 60  # a rate that is stable where nothing is stale: below 2
TASK = RowsTask("tied")
SETTINGS: dict[str, Any] = {
    "max_steps": 80, "global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.02, "optim": "sgd",
    "lr_scheduler_type": "constant", "warmup_steps": 0, "bucket_mb": 0.004, "balance": "off",
}  # fmt: skip


class Stale(Sync, Guardable):
    """On-arrival workers in scripted time, of which the guard sees the losses. It is tightened as `Async` is."""

    def __init__(self, simulator: Simulator, wire: Wire) -> None:
        self.members = Members(wire)
        self.simulator = simulator

    def attach(self, replica: Any) -> None: ...

    def step(self, replica: Any, step: int) -> None: ...

    def tighten(self) -> str:
        simulator = self.simulator
        if simulator.max_staleness == 0:
            return ""
        simulator.max_staleness = (simulator.max_staleness or WORKERS) // 2
        simulator.ahead = simulator.max_staleness > 0
        for worker in simulator.workers:
            while len(worker.given) > 1 + simulator.ahead:
                worker.given.popleft()
        return f"at most {simulator.max_staleness}"

    @classmethod
    def cost(cls, config: Any, sizes: Sizes) -> Cost:
        return Cost()


def stale_run(mesh: Mesh, guarded: bool) -> tuple[list[float], list[str]]:
    """The losses x^2 / 2 as the workers see them, and what the guard has said."""
    run = run_of(mesh, "allreduce", TASK)
    losses: list[float] = []
    said: list[str] = []

    def gradient(worker: int, step: int, theta: Tensor) -> Tensor:
        loss = (theta.square().sum() / 2).item()
        losses.append(loss)
        if guarded:
            guard.watch(loss)
        return theta / WORKERS

    server = serve(Arrivals(lambda step: RATE), "sgd")
    simulator = Simulator(server, gradient, [1] * WORKERS, ahead=True)
    config = load_config(None, [], {}, strategy="async", guard=0.2).config
    wire = run.mesh.wire("replicate")
    guard = Guard(config, wire, Stale(simulator, wire), said.append)
    simulator.run(STEPS)
    return losses, said


def test_staleness_that_is_too_high_is_taken_back(pool: Pool) -> None:
    (alone, _), (guarded, said) = (pool.world(1, stale_run, on)[0] for on in (False, True))
    assert alone[-1] > 1e3 * alone[0]
    assert guarded[-1] < 1e-3 * guarded[0]
    assert [line.rpartition(" ")[2] for line in said] == ["4", "2", "1", "0"]
    assert all(line.startswith("guard: the loss is ") for line in said)


def phases(mesh: Mesh, output_dir: str, **settings: Any) -> tuple[list[float], list[float]]:
    """The loss of each step and the guard's phase after it, of a run by the loop."""
    follow(mesh, "diloco", TASK, output_dir=output_dir, **SETTINGS | settings)
    if mesh.rank:
        return [], []
    lines = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "train/loss" in line]
    return [s["train/loss"] for s in steps], [s.get("sync/guard_phase", -1) for s in steps]


ASTRAY = {"sync_every": 8, "overlap_steps": 6, "outer_lr": 2.5, "outer_momentum": 0.9}


def test_all_reduce_takes_over_from_replicas_whose_syncs_come_too_late(pool: Pool, tmp_path: Path) -> None:
    settings = {**ASTRAY, "guard": 0.1, "guard_steps": 10}
    (alone, _), _ = pool.world(2, phases, str(tmp_path / "alone"), **ASTRAY)
    (losses, phase), _ = pool.world(2, phases, str(tmp_path / "guarded"), **settings)
    assert phase[:9] == [0] * 9
    assert sorted(phase) == phase
    assert phase[-1] == 2
    assert losses[-1] < 0.8 * alone[-1]


@pytest.mark.parametrize("strategy", ["local", "diloco", "noloco", "gossip"])
def test_nothing_is_done_where_nothing_is_wrong(pool: Pool, tmp_path: Path, strategy: str) -> None:
    settings = {"strategy": strategy, "guard": 0.5, "guard_drift": 0.5, "max_steps": 40}
    (losses, phase), _ = pool.world(2, phases, str(tmp_path), **settings)
    assert phase == [1] * 40
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("strategy", ["local", "diloco", "noloco", "gossip"])
def test_replicas_that_drift_apart_are_seen(pool: Pool, tmp_path: Path, strategy: str) -> None:
    every = {} if strategy == "gossip" else {"sync_every": 4}
    settings = {"strategy": strategy, "guard": 0.5, "guard_drift": 1e-9, "max_steps": 60, **every}
    (_, phase), _ = pool.world(2, phases, str(tmp_path), **settings)
    assert sorted(phase) == phase
    assert phase[-1] == 2
