"""Law 7: interrupted equals uninterrupted: the same bits at the same world size, the same ledger at another."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws.launches import BATCH, Fault, flags, ledger_of, losses_of, shoal, weights_of
from laws.pool import Outcome, Pool
from laws.rows import RowsTask
from laws.strategies import STRATEGIES, each_that_keeps
from laws.worlds import first_difference, follow, run_of

from shoal.checkpoint import Parts
from shoal.errors import DONE, FAILED, PREEMPTED
from shoal.tensors.tensor_files import Stored
from shoal.wire.mesh import Mesh

STEPS, STOPPED = 12, 5
TASK = RowsTask("tied", dropout=0.1)
KEPT = ("step", "tokens", "nonfinite_total", "best", "data")  # shares follow the speed of the ranks


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = {
        "max_steps": STEPS,
        "global_batch_size": 12,
        "per_device_train_batch_size": 2,
        "bucket_mb": 0.004,
    }
    return common | {"output_dir": str(folder), "precision": "32-true", "learning_rate": 0.01} | more


@pytest.mark.parametrize("optim", ["adamw", "muon", "sgd"])
@each_that_keeps(7)
def test_interrupted_equals_uninterrupted(pool: Pool, tmp_path: Path, strategy: str, optim: str) -> None:
    wholes = pool.world(2, follow, strategy, TASK, **settings(tmp_path / "whole", optim=optim))
    broken = settings(tmp_path / "broken", optim=optim)
    firsts = pool.world(2, follow, strategy, TASK, stop_after=STOPPED, **broken)
    resumed = pool.world(2, follow, strategy, TASK, resume_from_checkpoint="latest", **broken)
    for whole, first, record in zip(wholes, firsts, resumed, strict=True):
        assert first.stopped
        assert first_difference(whole.tensors[:STOPPED], first.tensors) is None
        assert first_difference(whole.tensors[STOPPED:], record.tensors) is None
        assert [record.progress[key] for key in KEPT] == [whole.progress[key] for key in KEPT]
    assert losses_of(tmp_path / "broken") == wholes[0].losses


@pytest.mark.parametrize(
    ("first", "then", "anew"),
    [
        ("sgd", "adamw", True),
        ("muon", "sgd", True),
        ("adamw", "adamw-8bit", False),
        ("adamw-8bit", "adamw", False),
    ],
)
def test_another_optimizer_starts_anew_or_goes_on(
    pool: Pool, tmp_path: Path, first: str, then: str, anew: bool
) -> None:
    """As if it had begun at the step: it counts its updates from there, or from the start of the run."""
    pool.world(1, follow, "allreduce", TASK, stop_after=STOPPED, **settings(tmp_path, optim=first))
    again = settings(tmp_path, optim=then, resume_from_checkpoint="latest", save_steps=STEPS)
    pool.world(1, follow, "allreduce", TASK, **again)
    state = Stored(tmp_path / f"checkpoint-{STEPS}" / "optimizer")
    counts = {int(state.read(name)) for name in state.shapes if name.endswith("/step")}
    assert counts == (set() if then == "sgd" else {STEPS - STOPPED if anew else STEPS})


@pytest.mark.parametrize("ranks", [1, 3, 4])
@each_that_keeps(3)
def test_interrupted_and_resumed_on_other_ranks(
    pool: Pool, tmp_path: Path, strategy: str, ranks: int
) -> None:
    """In float64 up to rounding; what is exact, in bf16 to the last bit."""
    exact = STRATEGIES[strategy].exact
    tolerance, precision = (0.0, "bf16-mixed") if exact else (1e-9, "64-true")
    whole = pool.world(2, follow, strategy, TASK, **settings(tmp_path / "whole", precision=precision))[0]
    broken = settings(tmp_path / "broken", precision=precision)
    pool.world(2, follow, strategy, TASK, stop_after=STOPPED, **broken)
    resumed = pool.world(ranks, follow, strategy, TASK, resume_from_checkpoint="latest", **broken)[0]
    assert first_difference(whole.tensors[STOPPED:], resumed.tensors, tolerance) is None
    np.testing.assert_allclose(losses_of(tmp_path / "broken"), whole.losses, rtol=tolerance)


def reads_of_ranks(mesh: Mesh, row: str, **given: Any) -> dict[tuple[str, str], int]:
    """How often this rank reads what each rank has saved alone, by file and heading, when it resumes."""
    reads: Counter[tuple[str, str]] = Counter()
    read = Parts._read

    def counted(parts: Parts, rank: int) -> Any:
        reads[parts.files[rank].name, parts.prefix] += 1
        return read(parts, rank)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Parts, "_read", counted)
        run_of(mesh, row, TASK, resume_from_checkpoint="latest", **given)
    return reads


@pytest.mark.parametrize("strategy", ["demo", "noloco", "diloco-streaming", "gossip-int8"])
def test_what_a_rank_has_saved_is_read_once(pool: Pool, tmp_path: Path, strategy: str) -> None:
    """Not once a parameter; by another number of ranks once for the strategy, and once for its codec."""
    given = settings(tmp_path)
    pool.world(2, follow, strategy, TASK, stop_after=STOPPED, **given)
    for ranks, most in ((2, 1), (3, 2)):
        for reads in pool.world(ranks, reads_of_ranks, strategy, **given):
            assert reads.keys()
            assert max(reads.values()) <= most, (ranks, reads)


@each_that_keeps(10)
def test_the_ledger_does_not_depend_on_what_happened(
    pool: Pool, data: list[str], tmp_path: Path, strategy: str
) -> None:
    """Two epochs: at once on one rank; and on three that are killed, on two that are stopped, and on four."""

    def train(run: Path, ranks: int, *more: str, fault: Fault | None = None) -> Outcome:
        words = ["train", *data, *BATCH, *flags(strategy), "--ledger", "--num-train-epochs", "2"]
        words += ["--save-steps", "4", "--output-dir", str(run), "--nproc-per-node", str(ranks), *more]
        return pool.alone(shoal, words, fault)

    resume = ("--resume-from-checkpoint", "latest")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, 1).code == DONE
    steps = len(losses_of(whole))
    assert steps > 20
    assert train(broken, 3, fault=Fault("kill", 1, 6, "exchange")).code == FAILED
    assert train(broken, 2, *resume, fault=Fault("sigterm", 0, 13, "backward")).code == PREEMPTED
    assert train(broken, 4, *resume).code == DONE
    assert ledger_of(broken) == ledger_of(whole)
    np.testing.assert_allclose(
        losses_of(broken), losses_of(whole), rtol=0 if STRATEGIES[strategy].exact else 0.05
    )
    if STRATEGIES[strategy].exact:
        assert first_difference([weights_of(whole)], [weights_of(broken)]) is None

    audited = pool.alone(shoal, ["audit", str(broken)])
    assert audited.code == DONE, audited.output
    assert f"{steps} steps on 4 ranks" in audited.output
    assert "2 whole epochs" in audited.output
    (broken / "ledger" / "rank-00001.jsonl").unlink()
    assert pool.alone(shoal, ["audit", str(broken)]).code == FAILED


def test_another_batch_by_another_worker_count_goes_on_exactly(
    pool: Pool, data: list[str], tmp_path: Path
) -> None:
    """Steps of 4 samples, of 12 and of 6, by the workers alone: each sample once an epoch, in the same order."""

    def train(run: Path, ranks: int, turns: int, *more: str, fault: Fault | None = None) -> Outcome:
        words = [
            "train",
            *data,
            "--per-device-train-batch-size",
            "2",
            "--gradient-accumulation-steps",
            str(turns),
        ]
        words += ["--ledger", "--num-train-epochs", "2", "--save-steps", "4", "--lr", "0.01"]
        words += ["--output-dir", str(run), "--nproc-per-node", str(ranks), *more]
        return pool.alone(shoal, words, fault)

    resume = ("--resume-from-checkpoint", "latest")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, 1, 4).code == DONE
    assert train(broken, 2, 1, fault=Fault("kill", 1, 6, "exchange")).code == FAILED
    assert train(broken, 3, 2, *resume, fault=Fault("sigterm", 0, 9, "backward")).code == PREEMPTED
    last = train(broken, 3, 1, *resume)
    assert last.code == DONE, last.output
    samples = [[i for step in ledger_of(run).values() for i in step if i >= 0] for run in (whole, broken)]
    assert samples[0] == samples[1]
    steps = {len(step) for step in ledger_of(broken).values()}
    assert steps == {4, 12, 6}
    audited = pool.alone(shoal, ["audit", str(broken)])
    assert audited.code == DONE, audited.output
    assert "2 whole epochs" in audited.output
