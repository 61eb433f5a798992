"""Who waits for what another rank does alone waits without the deadline of a collective, and notices its death.

Here a collective's deadline is some seconds, and what is done alone takes longer: this is the one place that sleeps.
"""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from laws.pool import Pool
from laws.ports import free_port
from laws.rows import RowsTask
from laws.worlds import follow, run_of
from torch import Tensor, nn

from shoal import checkpoint
from shoal.checkpoint import saving
from shoal.errors import ShoalError
from shoal.layouts.base import whole_model
from shoal.sync.server_strategy import ServerStrategy
from shoal.tensors.precision import resolve
from shoal.training.evaluate import ASK_EVERY, Evaluators, evaluate
from shoal.wire import meeting
from shoal.wire.mesh import Axis, Mesh, join
from shoal.wire.rendezvous import Rendezvous

DEADLINE, LONGER = timedelta(seconds=3), 5.0
TASK = RowsTask("tied")


def hurried(made: Mesh) -> Mesh:
    """The same ranks, of whom each collective waits for the DEADLINE only."""
    meeting.TIMEOUT = DEADLINE
    group = meeting.new_group(list(range(made.world_size)))
    return replace(made, group=group, axes={"replicate": Axis(made.world_size, made.rank, group)})


def slow(owner: Any, name: str) -> None:
    """From now on the first call takes LONGER."""
    original = getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        time.sleep(LONGER)
        return original(*args, **kwargs)

    setattr(owner, name, late)


def save_and_resume(made: Mesh, folder: str) -> list[int]:
    made = hurried(made)
    settings = {
        "output_dir": folder,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
    }
    if made.is_first:
        slow(saving, "_hand_over")  # parameters are being written, and must not change
        slow(saving, "write")  # the checkpoint before is not in place yet
        slow(checkpoint, "find")  # the one to go on from is being hashed
    follow(made, "allreduce", TASK, max_steps=3, **settings)
    again = follow(made, "allreduce", TASK, max_steps=4, resume_from_checkpoint="latest", **settings)
    return [again.progress["step"], len(again.tensors)]


def test_writing_and_choosing_a_checkpoint_may_take_longer_than_a_collective(
    pool: Pool, tmp_path: Path
) -> None:
    assert pool.world(2, save_and_resume, str(tmp_path)) == [[4, 1]] * 2


def finish_late(made: Mesh, late: int) -> int:
    meeting.TIMEOUT = DEADLINE / 2  # a line that has broken is made again, once
    if made.rank == late:
        slow(ServerStrategy, "_leave")
    settings = {"global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 3}
    run = run_of(made, "async", TASK, **settings)
    for step in range(3):
        taken = run.replica.gradients(run.batches.at(step))
        run.sync.step(run.replica, taken)
    run.sync.members.finish(run.replica)
    return int(run.sync.servers.versions[0])


def test_a_worker_waits_for_the_others_of_its_servers_longer_than_for_an_exchange(pool: Pool) -> None:
    assert pool.world(2, finish_late, 0) == [6, 6]


def wait_for_the_dead(made: Mesh) -> None:
    if made.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    made.wire("world").wait_for_first()


def test_that_rank_0_has_died_is_noticed(pool: Pool) -> None:
    _, left = pool.wait(pool.start(wait_for_the_dead, ranks=2))
    assert left.error.startswith("PeerLost")


def come(rank: int, port: int, late: int) -> int:
    meeting.TIMEOUT, meeting.WORD = DEADLINE, timedelta(seconds=1)
    if rank == late:
        time.sleep(LONGER)
    with join(Rendezvous(rank, 2, port=port)) as made:
        return int(made.wire("world").sum(torch.tensor([rank + 1])))


def hear_late(made: Mesh) -> str:
    time.sleep(made.rank)
    return made.wire("world").share_text("the last word")


def test_who_reads_late_still_reads_what_rank_0_wrote_last(pool: Pool) -> None:
    """Rank 0 keeps the store, and has nothing left to do."""
    assert pool.world(2, hear_late) == ["the last word"] * 2


@pytest.mark.parametrize(
    ("late", "awaited"), [(0, "worker 0 at 127.0.0.1"), (1, "1 of 2 workers (worker 1)")]
)
def test_a_rank_may_come_late_and_it_is_said_who_is_awaited(pool: Pool, late: int, awaited: str) -> None:
    port = free_port()
    started = [pool.start(come, rank, port, late)[0] for rank in range(2)]
    outcomes = pool.wait(started)
    assert [outcome.value for outcome in outcomes] == [3, 3], outcomes
    assert f"shoal: waiting for {awaited}" in outcomes[1 - late].output


class Few:
    """Samples without content, of one label each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        return {"x": torch.ones(len(ids))}

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        return (ids >= 0).astype(np.int64)


def measure(made: Mesh, stopped_at: int, count: int) -> tuple[Any, int, int]:
    """Evaluate, with a wish to stop on rank 1 after so many micro-batches; the result, and what each has done."""
    wire, done = made.wire("world"), [0, 0]

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        done[0] += 1
        return inputs["x"].sum()

    def agree(numbers: Tensor) -> Tensor:
        done[1] += 1
        return wire.sum(numbers)

    found = evaluate(
        whole_model(nn.Identity(), loss),
        loss,
        Few(count),  # type: ignore[arg-type]
        micro_batch_size=1,
        among=Evaluators(made.rank, made.world_size, agree),
        policy=resolve("32-true", made.device),
        device=made.device,
        stop=lambda: made.rank == 1 and done[0] >= stopped_at,
    )
    return found, done[0], done[1]


@pytest.mark.parametrize("stopped_at", [0, 5, 1000])
def test_all_leave_an_evaluation_together(pool: Pool, stopped_at: int) -> None:
    """In which ranks have unequal shares."""
    count = 3 * 10 * ASK_EVERY + 1
    ranks = pool.world(3, measure, stopped_at, count)
    assert len({asked for _, _, asked in ranks}) == 1
    for found, measured, _ in ranks:
        assert (found is None) == (stopped_at < 1000)
        assert found is None or (found.sums, found.labels) == ([count], count)
        assert found is not None or measured < stopped_at + ASK_EVERY


@pytest.mark.parametrize("minutes", [10, None])
def test_the_part_of_a_slow_rank_is_awaited_while_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int | None
) -> None:
    """A minute passes at each look; the other rank writes for so many, or has stopped after the first."""
    part = tmp_path / saving.rank_file("ranks", 1)
    part.parent.mkdir()
    passed = 0

    def pass_a_minute(seconds: float) -> None:
        nonlocal passed
        passed += 1
        saving.unready(part).write_bytes(b"x" * (passed if minutes else 1))
        if passed == minutes:
            saving.unready(part).rename(part)

    monkeypatch.setattr(saving, "time", SimpleNamespace(sleep=pass_a_minute, monotonic=lambda: 60.0 * passed))
    waiting = saving.Checkpoints(tmp_path, every=1, keep=1, world_size=2)
    with nullcontext() if minutes else pytest.raises(ShoalError, match="the part of rank 1 did not come"):
        waiting._receive(tmp_path, [saving.rank_file("ranks", 0)])
    assert passed == minutes or passed < 10
