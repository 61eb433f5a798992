"""Law 10: a fault at a chosen (rank, step, phase) ends in one clear error or in the agreed skip.

Never in a hang, never in a wrong number. Stops and kills at every phase are in `test_stopping`.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from laws.launches import (
    BATCH,
    Fault,
    catches,
    flags,
    insert,
    is_alive,
    losses_of,
    shoal,
    steps_of,
    weights_of,
    workers_of,
)
from laws.pool import HANG, Outcome, Pool, Started
from laws.rows import RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import Record, first_difference, follow

from shoal import checkpoint
from shoal.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PREEMPTED
from shoal.system import manifest
from shoal.wire.mesh import Mesh

STEPS, SAVED = 8, 3
COMMON = [*BATCH, "--max-steps", str(STEPS), "--save-steps", str(SAVED), "--nproc-per-node"]
RESUME = ["--resume-from-checkpoint", "latest"]


@pytest.fixture(scope="module")
def undisturbed(
    pool: Pool, data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Path]:
    """The folders of runs that nothing happened to, made when first asked for."""

    class Runs(dict[tuple[str, int], Path]):
        def __missing__(self, key: tuple[str, int]) -> Path:
            strategy, ranks = key
            self[key] = tmp_path_factory.mktemp("runs") / "undisturbed"
            done = train(pool, data, self[key], strategy, ranks)
            assert done.code == DONE, done.output
            return self[key]

    return Runs()


def words(data: list[str], run: Path, strategy: str, ranks: int) -> list[str]:
    return ["train", *data, *flags(strategy), "--output-dir", str(run), *COMMON, str(ranks)]


def train(
    pool: Pool, data: list[str], run: Path, strategy: str, ranks: int, *more: str, fault: Any = None
) -> Outcome:
    return pool.alone(shoal, [*words(data, run, strategy, ranks), *more], fault)


def errors_in(outcome: Outcome) -> list[str]:
    return [line for line in outcome.output.splitlines() if line.startswith("shoal: ")]


def the_last_line(outcome: Outcome) -> str:
    """The only line that speaks of an error, which must be the last."""
    (error,) = errors_in(outcome)
    assert outcome.output.endswith(error + "\n")
    return error


def assert_goes_on(pool: Pool, data: list[str], run: Path, strategy: str, ranks: int, whole: Path) -> None:
    """Resumed, the run ends in the very numbers of the one that nothing happened to."""
    resumed = train(pool, data, run, strategy, ranks, *RESUME)
    assert resumed.code == DONE, resumed.output
    assert losses_of(run) == losses_of(whole)
    assert first_difference([weights_of(whole)], [weights_of(run)]) is None


@pytest.mark.parametrize(
    ("phase", "rank", "step"), [("forward", 1, 4), ("backward", 0, 0), ("exchange", 2, 4), ("save", 0, 5)]
)
@each_that_keeps(10)
def test_the_error_of_one_worker_is_the_last_thing_said(
    pool: Pool, data: list[str], tmp_path: Path, strategy: str, phase: str, rank: int, step: int
) -> None:
    failed = train(pool, data, tmp_path, strategy, 3, fault=Fault("raise", rank, step, phase))
    assert failed.code == FAILED, failed.output
    assert f"RuntimeError: the fault in {phase} (worker {rank};" in the_last_line(failed)
    assert failed.output.count("Traceback") == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_a_fault_before_the_ranks_have_met_ends_all(
    pool: Pool, data: list[str], tmp_path: Path, kind: str, rank: int
) -> None:
    """The others then wait for one that never comes, in a call that hears no signal."""
    failed = train(pool, data, tmp_path, "allreduce", 3, fault=Fault(kind, rank, -1, "join"))
    assert failed.code == FAILED, failed.output
    (error,) = errors_in(failed)
    assert (
        f"worker {rank} was killed by SIGKILL" if kind == "kill" else "RuntimeError: the fault in join"
    ) in error


@each_that_keeps(10)
def test_one_gradient_that_is_not_finite_is_skipped_by_all(pool: Pool, tmp_path: Path, strategy: str) -> None:
    fault = Fault("nan", 1, 3, "backward")
    ranks = pool.world(3, follow_with, fault, strategy, str(tmp_path))
    for record in ranks:
        assert first_difference(record.tensors[2:3], record.tensors[3:4]) is None
        assert first_difference(record.tensors[3:4], record.tensors[4:5]) is not None
        assert first_difference(ranks[0].tensors, record.tensors) is None
        assert record.progress["nonfinite_total"] == 1
    steps = steps_of(tmp_path)
    assert [math.isfinite(s["train/grad_norm"]) for s in steps] == [True] * 3 + [False] + [True] * 4
    assert [s["train/skipped_steps"] for s in steps] == [0] * 3 + [1] * 5
    assert all(math.isfinite(s["train/loss"]) for s in steps)


def follow_with(mesh: Mesh, fault: Fault, strategy: str, output_dir: str) -> Record:
    """As `follow`, with a fault on one rank."""
    if mesh.rank == fault.rank:
        insert(fault)
    settings = {"max_steps": STEPS, "global_batch_size": 12, "per_device_train_batch_size": 2}
    return follow(mesh, strategy, RowsTask(), output_dir=output_dir, bucket_mb=0.004, **settings)


@each_that_keeps(10)
def test_gradients_that_stay_not_finite_end_the_run(
    pool: Pool, data: list[str], tmp_path: Path, undisturbed: Any, strategy: str
) -> None:
    failed = train(pool, data, tmp_path, strategy, 2, fault=Fault("nan", 1, 4, "backward", steps=3))
    assert failed.code == FAILED
    (error,) = errors_in(failed)
    assert "step 7: the gradient was not finite 3 times in a row" in error
    assert "Traceback" not in failed.output
    good = str(tmp_path / f"checkpoint-{SAVED}")
    resumed = train(pool, data, tmp_path, strategy, 2, "--resume-from-checkpoint", good)
    assert resumed.code == DONE, resumed.output
    assert losses_of(tmp_path) == losses_of(undisturbed[strategy, 2])


@pytest.mark.parametrize("phase", ["save", "observe"])
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(
    pool: Pool, data: list[str], tmp_path: Path, undisturbed: Any, phase: str
) -> None:
    failed = train(pool, data, tmp_path, "allreduce", 2, fault=Fault("full disk", 0, 5, phase))
    assert failed.code == BAD_INPUT
    (error,) = errors_in(failed)
    assert f"{tmp_path}: the disk is full; free some space; go on from {tmp_path / 'checkpoint-3'} " in error
    assert "Traceback" not in failed.output
    assert manifest.verify(tmp_path / "checkpoint-3") is None
    assert_goes_on(pool, data, tmp_path, "allreduce", 2, undisturbed["allreduce", 2])


LONG = ["--max-steps", "100000", "--save-steps", "50", "--lr-scheduler-type", "constant"]


def start_long_run(
    pool: Pool, data: list[str], run: Path, *, trains: bool = True
) -> tuple[Started, list[int]]:
    """A run of two workers that would take long; returns when both are there, or when it has taken a step."""
    (started,) = pool.start(shoal, [*words(data, run, "allreduce", 2), *LONG])
    deadline = time.monotonic() + HANG
    while (
        len(workers_of(started.pid)) < 2
        or not catches(started.pid, signal.SIGTERM)
        or (trains and not steps_of(run))
    ):
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.01)
    return started, workers_of(started.pid)


def assert_gone(workers: list[int]) -> None:
    deadline = time.monotonic() + HANG
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.01)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(signal.SIGINT, 1, INTERRUPTED), (signal.SIGINT, 2, INTERRUPTED), (signal.SIGTERM, 1, PREEMPTED)],
)
def test_a_signal_to_the_launcher_ends_all(
    pool: Pool, data: list[str], tmp_path: Path, number: signal.Signals, times: int, code: int, trains: bool
) -> None:
    started, workers = start_long_run(pool, data, tmp_path, trains=trains)
    for _ in range(times):
        started.send(number)
    ended = started.wait()
    assert ended.code == code, ended.output
    assert len(errors_in(ended)) == 1
    assert "Traceback" not in ended.output
    assert_gone(workers)
    if trains and times == 1:
        assert manifest.verify(tmp_path / f"checkpoint-{steps_of(tmp_path)[-1]['step']}") is None


@pytest.mark.parametrize("trains", [False, True])
def test_a_killed_launcher_leaves_no_orphan(
    pool: Pool, data: list[str], tmp_path: Path, trains: bool
) -> None:
    started, workers = start_long_run(pool, data, tmp_path, trains=trains)
    started.send(signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    assert_gone(workers)
    for path in checkpoint.candidates(tmp_path):
        assert manifest.verify(path) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_takes_the_others_along(
    pool: Pool, data: list[str], tmp_path: Path, rank: int
) -> None:
    """As the kernel does where memory runs out: no fault of ours, a signal from outside."""
    started, workers = start_long_run(pool, data, tmp_path)
    os.kill(workers[rank], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == FAILED
    assert f"worker {rank} was killed by SIGKILL" in errors_in(ended)[0]
    assert_gone(workers)
