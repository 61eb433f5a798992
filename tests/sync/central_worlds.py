"""What ranks do in the tests of the strategies with a parameter server."""

import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from laws.rows import RowsTask
from laws.worlds import Arrays, parameters, run_of

from shoal.cost import Sizes
from shoal.servers.stubs import RemoteStub
from shoal.sync.server_strategy import Traffic
from shoal.wire.mesh import Mesh

SETTINGS: dict[str, Any] = {
    "global_batch_size": 12, "per_device_train_batch_size": 2, "learning_rate": 0.01, "bucket_mb": 0.004,
    "balance": "off", "precision": "64-true", "max_steps": 12,
}  # fmt: skip


@dataclass
class Outcome:
    """How a rank ended: its parameters after finish, what the loop was told, the versions of the servers."""

    final: Arrays
    numbers: list[float]
    versions: list[int]
    staleness: list[float]
    bytes_sent: list[int]
    predicted: float  # of these in a step
    last: float  # and when all have finished


def steps_of(
    mesh: Mesh,
    strategy: str,
    task: RowsTask,
    *,
    killed: int = -1,
    at: int = 5,
    held_up: Path | None = None,
    **settings: Any,
) -> Outcome:
    """Take the steps of a run without evaluating or saving; rank `killed` dies in step `at`.

    With `held_up`, an empty folder, rank 1 holds its gradient of step `at` until rank 0 has taken its last step; and
    rank 0 takes this step only when rank 1 has that gradient.
    """
    RemoteStub.RECONNECT = timedelta(seconds=1)
    run = run_of(mesh, strategy, task, **SETTINGS | settings)
    numbers, staleness, sent = [], [], []
    for step in range(run.total_steps):
        taken = run.replica.gradients(run.batches.at(step))
        if mesh.rank == killed and step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if held_up and step == at:
            _hold_up(mesh.rank, held_up)
        before = run.mesh.wire("replicate").bytes_sent
        run.sync.step(run.replica, taken)
        sent.append(run.mesh.wire("replicate").bytes_sent - before)
        numbers.append(run.sync.members.agree(torch.tensor([1.0, 0.0], dtype=torch.float64))[0].item())
        staleness.append(run.sync.metrics().get("sync/staleness", 0.0))
    if held_up and mesh.rank == 0:
        (held_up / "rank 0 is done").touch()
    before = run.mesh.wire("replicate").bytes_sent
    run.sync.members.finish(run.replica)
    sent.append(run.mesh.wire("replicate").bytes_sent - before)
    sizes = Sizes(tuple(p.shape for _, p in run.replica.params), mesh.world_size, itemsize=8)
    traffic = Traffic.of(run.config, sizes)
    predicted = traffic.sent(mesh.rank, mesh.world_size)
    last = (mesh.world_size - 1) * traffic.down[mesh.rank] if run.sync.host else 0
    if run.sync.host and mesh.rank:  # rank 0 has asked for the optimizers' state
        last += sum(tensor.nbytes for tensor in run.sync.host.state().values())
    return Outcome(parameters(run), numbers, run.sync.servers.versions, staleness, sent, predicted, last)


def _hold_up(rank: int, folder: Path) -> None:
    if rank == 1:
        (folder / "rank 1 has its gradient").touch()
    awaited = folder / ("rank 0 is done" if rank else "rank 1 has its gradient")
    while not awaited.exists():
        time.sleep(0.01)
