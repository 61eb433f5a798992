"""The ledger proves that each sample was used once, and finds it where one was not."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from laws.rows import Rows

from shoal.data.batches import Batch, Batches
from shoal.errors import UserError
from shoal.observe.ledger import Ledger, audit
from shoal.shares import equal

SIZE, BATCH = 13, 6


def record(
    run: Path, steps: range, ranks: int, attempt: int, *, epochs: float = 3.0, batch: int = BATCH,
    at: tuple[int, int] = (0, 0),
) -> Batches:  # fmt: skip
    """Write the ledgers of `ranks` ranks that share these steps."""
    batches = Batches(
        Rows(SIZE, 4), seed=1, global_batch_size=batch, micro_batch_size=1, epochs=epochs, at=at
    )
    shares = equal(batch, ranks)
    for rank in range(ranks):
        ledger = Ledger(run / "ledger", rank, attempt, batches)
        for step in steps:
            ledger.write(batches.at(step), shares.of(rank))
    return batches


def lines(run: Path, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (run / f"ledger/rank-{rank:05d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("epochs", "whole"), [(3.0, 3), (1.5, 1), (0.5, 0)])
def test_whole_epochs_are_proved(tmp_path: Path, ranks: int, epochs: float, whole: int) -> None:
    steps = -(-round(epochs * SIZE) // BATCH)
    record(tmp_path, range(steps), ranks, 1, epochs=epochs)
    found = audit(tmp_path)
    assert found.ok, found.faults
    assert (found.samples, found.steps, found.whole_epochs, found.ranks) == (SIZE, steps, whole, ranks)
    assert found.used == round(epochs * SIZE)
    assert "each sample was used exactly once" in str(found)


def test_steps_done_again_after_a_kill_count_once(tmp_path: Path) -> None:
    """Three ranks come to step 4, are killed, and two go on from the checkpoint of step 2."""
    record(tmp_path, range(4), 3, 1)
    with (tmp_path / "ledger/rank-00001.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 4, "fir')
    record(tmp_path, range(2, 7), 2, 2)
    assert audit(tmp_path).faults == []
    assert audit(tmp_path).steps == 7


def test_another_batch_is_no_fault_and_takes_back_later_steps(tmp_path: Path) -> None:
    """Five steps of 4, killed; from the third on steps of 9, of which two are left; the end is behind step 4."""
    record(tmp_path, range(5), 2, 1, batch=4, epochs=2)
    record(tmp_path, range(2, 4), 3, 2, batch=9, epochs=2, at=(2, 8))
    found = audit(tmp_path)
    assert found.faults == []
    assert (found.steps, found.used, found.whole_epochs) == (4, 2 * SIZE, 2)


@pytest.mark.parametrize("position", [5, 7])
def test_a_batch_that_does_not_go_on_where_the_last_ended_is_found(tmp_path: Path, position: int) -> None:
    record(tmp_path, range(1), 1, 1)
    record(tmp_path, range(1, 2), 1, 2, at=(1, position))
    fault = f"step 1: it begins at sample {position}, and the one before ended at 6"
    assert fault in audit(tmp_path).faults


def test_a_ledger_may_begin_in_the_midst_of_the_data(tmp_path: Path) -> None:
    """As of a run that begins from a checkpoint of another one."""
    record(tmp_path, range(3, 8), 2, 1, at=(3, 7), epochs=2.5)
    found = audit(tmp_path)
    assert found.faults == []
    assert (found.first, found.used, found.whole_epochs) == (7, 32 - 7, 1)
    assert "from sample 7 on" in str(found)


def test_a_ledger_of_old_is_read(tmp_path: Path) -> None:
    """It told the rows of a step once for all, and no positions."""
    record(tmp_path, range(7), 2, 1)
    facts = tmp_path / "ledger" / "run.json"
    facts.write_text(json.dumps({"samples": SIZE, "rows": BATCH, "end": 39}))
    for rank in (0, 1):
        own = [{k: v for k, v in e.items() if k not in ("position", "rows")} for e in lines(tmp_path, rank)]
        path = tmp_path / f"ledger/rank-{rank:05d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in own))
    assert audit(tmp_path).faults == []


def use_twice(own: list[dict]) -> None:
    own[1]["samples"][0] = own[0]["samples"][0]


def lose_a_sample(own: list[dict]) -> None:
    own[1]["samples"].pop()


def lose_a_step(own: list[dict]) -> None:
    del own[1]


def compute_a_step_twice(own: list[dict]) -> None:
    own.append(own[0])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (use_twice, "epoch 0: sample [0-9]+ was used 2 times"),
        (lose_a_sample, "step 1: [0-9] of 6 rows are recorded"),
        (lose_a_step, "step 1( is missing|: 3 of 6 rows are recorded)"),
        (compute_a_step_twice, "step 0: .* of 6 rows are recorded"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sample_that_is_lost_or_used_twice_is_found(
    tmp_path: Path, ranks: int, change: Callable[[list[dict]], None], fault: str
) -> None:
    record(tmp_path, range(7), ranks, 1)
    own = lines(tmp_path)
    change(own)
    (tmp_path / "ledger/rank-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    assert any(re.match(fault, each) for each in audit(tmp_path).faults), audit(tmp_path).faults


@pytest.mark.parametrize("steps", [2, 7])
def test_a_rank_whose_file_is_missing_is_found(tmp_path: Path, steps: int) -> None:
    record(tmp_path, range(steps), 2, 1)
    (tmp_path / "ledger/rank-00001.jsonl").unlink()
    assert not audit(tmp_path).ok


def test_a_sample_that_is_not_there_is_found(tmp_path: Path) -> None:
    batches = record(tmp_path, range(2), 1, 1)
    ids = np.full((BATCH, 1), SIZE + 3)
    Ledger(tmp_path / "ledger", 0, 1, batches).write(
        Batch(2, batches.samples, ids, 0 * ids, 0, 2 * BATCH), range(BATCH)
    )
    assert not audit(tmp_path).ok


def test_a_run_without_a_ledger_says_how_to_have_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ledger"):
        audit(tmp_path)
