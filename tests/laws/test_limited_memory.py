"""A model three times as large as what a worker may have trains, the operating system's limit in force."""

import ctypes
import resource
from pathlib import Path
from typing import Any

from laws.deep import WIDTH, DeepTask
from laws.pool import Pool
from laws.rows import VOCABULARY
from laws.worlds import run_of

from shoal.wire.mesh import Mesh

DEPTH = 96
PARAMETERS = DEPTH * (WIDTH * WIDTH + WIDTH) + 2 * VOCABULARY * WIDTH + VOCABULARY
M_MMAP_THRESHOLD = -3  # of mallopt(3)
ALLOWANCE = PARAMETERS * 16 // 3  # bytes; 16 a parameter: itself, its gradient, AdamW's two moments


def data_bytes() -> int:
    """What counts against RLIMIT_DATA: memory of this process alone that it may write."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    ]
    return int(line.split()[1]) * 1024


def train(mesh: Mesh, depth: int, limit: int, **settings: Any) -> int:
    """Two steps of a model within a limit; returns the memory that is held after them."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    run = run_of(mesh, "allreduce", DeepTask(depth=depth), **settings)
    for step in range(2):
        taken = run.replica.gradients(run.batches.at(step))
        run.sync.step(run.replica, taken)
    return data_bytes()


def test_three_times_an_allowance_on_four_workers(pool: Pool, tmp_path: Path) -> None:
    size = {"precision": "32-true", "max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 2}
    size |= {"output_dir": str(tmp_path)}
    tiny = pool.world(4, train, 2, resource.RLIM_INFINITY, zero_stage=3, **size)
    limit = max(tiny) + ALLOWANCE
    held = pool.world(4, train, DEPTH, limit, zero_stage=3, **size)
    assert max(held) <= limit
    (alone,) = pool.wait(pool.start(train, DEPTH, limit, ranks=1, **size))
    assert alone.code, "one worker has room for all of it: the limit was not in force"
    assert "allocate" in alone.error + alone.output, alone
