"""Law 10 where it promises most: a killed worker leaves the others running, to the end of the real command."""

import json
import signal
import time
from pathlib import Path

import pytest
from laws.launches import BATCH, Fault, shoal, steps_of, weights_of
from laws.pool import Pool

from shoal.errors import DONE, FAILED, PREEMPTED
from shoal.system import manifest

STEPS = 12
COMMON = [
    *BATCH,
    "--max-steps",
    str(STEPS),
    "--save-steps",
    "4",
    "--eval-steps",
    "3",
    "--nproc-per-node",
    "3",
]
SPARING = {
    "server": ["--strategy", "server", "--quorum", "2"],
    "async": ["--strategy", "async"],
    "async-int8": ["--strategy", "async", "--codec", "int8", "--max-staleness", "4"],
    "gossip": ["--strategy", "gossip"],
    "gossip-push-sum": ["--strategy", "gossip", "--topology", "push-sum"],
    "gossip-int8": ["--strategy", "gossip", "--topology", "ring", "--codec", "int8"],
}


PHASES = [("forward", 5), ("exchange", 5), ("evaluate", 5), ("observe", 7)]
DEATHS = [(chosen, *phase) for chosen in ("server", "async", "gossip") for phase in PHASES]
DEATHS += [(chosen, "exchange", 5) for chosen in ("async-int8", "gossip-push-sum", "gossip-int8")]


@pytest.mark.parametrize(("chosen", "phase", "step"), DEATHS)
def test_the_others_train_evaluate_and_save_to_the_end(
    pool: Pool, data: list[str], tmp_path: Path, chosen: str, phase: str, step: int
) -> None:
    words = ["train", *data, *SPARING[chosen], "--output-dir", str(tmp_path), *COMMON]
    ended = pool.alone(shoal, words, Fault("kill", 1, step, phase))  # the others' files come after this one's
    assert ended.code == DONE, ended.output
    (said,) = [line for line in ended.output.splitlines() if "worker 1" in line]
    assert "go on" in said
    assert len(steps_of(tmp_path)) == STEPS
    assert manifest.verify(tmp_path / f"checkpoint-{STEPS}") is None
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    assert last["eval/loss"] < 6
    assert weights_of(tmp_path)
    assert not list(tmp_path.glob(".checkpoint-*"))
    resumed = pool.alone(
        shoal, [*words, "--max-steps", str(STEPS + 2), "--resume-from-checkpoint", "latest"], None
    )
    assert resumed.code == DONE, resumed.output
    assert len(steps_of(tmp_path)) == STEPS + 2


@pytest.mark.parametrize("chosen", ["server", "async", "gossip"])
def test_rank_0_is_never_spared(pool: Pool, data: list[str], tmp_path: Path, chosen: str) -> None:
    words = ["train", *data, *SPARING[chosen], "--output-dir", str(tmp_path), *COMMON]
    ended = pool.alone(shoal, words, Fault("kill", 0, 5, "forward"))
    assert ended.code == FAILED
    assert "worker 0 was killed by SIGKILL" in ended.output.splitlines()[-1]


def test_a_quorum_that_cannot_be_met_ends_the_run(pool: Pool, data: list[str], tmp_path: Path) -> None:
    words = ["train", *data, "--strategy", "server", "--quorum", "3", "--output-dir", str(tmp_path), *COMMON]
    ended = pool.alone(shoal, words, Fault("kill", 2, 5, "forward"))
    assert ended.code == FAILED
    assert "shoal: error" in ended.output.splitlines()[-1]


@pytest.mark.parametrize(
    "more",
    [
        ["--strategy", "async", "--guard", "0.5"],
        ["--strategy", "async", "--guard", "0.5", "--guard-steps", "4"],
        ["--strategy", "gossip", "--guard", "0.5", "--guard-steps", "4"],
        ["--strategy", "diloco", "--sync-every", "4", "--guard", "0.5", "--guard-drift", "0.5"],
    ],
)
def test_under_a_guard_a_run_ends_is_saved_and_goes_on(
    pool: Pool, data: list[str], tmp_path: Path, more: list[str]
) -> None:
    words = ["train", *data, *more, "--output-dir", str(tmp_path), *COMMON]
    assert pool.alone(shoal, words).code == DONE
    resumed = pool.alone(shoal, [*words, "--max-steps", str(STEPS + 3), "--resume-from-checkpoint", "latest"])
    assert resumed.code == DONE, resumed.output
    assert len(steps_of(tmp_path)) == STEPS + 3


@pytest.mark.parametrize("changed", [["--guard", "0.5"], ["--averaging", "slowmo"], ["--codec", "int8"], []])
def test_what_remembers_otherwise_starts_from_the_model(
    pool: Pool, data: list[str], tmp_path: Path, changed: list[str]
) -> None:
    words = [
        "train",
        *data,
        "--strategy",
        "local",
        "--sync-every",
        "4",
        "--output-dir",
        str(tmp_path),
        *COMMON,
    ]
    assert pool.alone(shoal, words).code == DONE
    resumed = pool.alone(
        shoal, [*words, *changed, "--max-steps", str(STEPS + 2), "--resume-from-checkpoint", "latest"]
    )
    assert resumed.code == DONE, resumed.output
    assert ("starts from the model of local" in resumed.output) == bool(changed)


def test_a_run_that_has_lost_a_worker_still_saves_when_asked_to_stop(
    pool: Pool, data: list[str], tmp_path: Path
) -> None:
    words = [
        "train",
        *data,
        *SPARING["gossip"],
        "--output-dir",
        str(tmp_path),
        *COMMON,
        "--max-steps",
        "100000",
    ]
    (started,) = pool.start(shoal, words, Fault("kill", 1, 5, "forward"))
    deadline = time.monotonic() + 100
    while len(steps_of(tmp_path)) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send(signal.SIGTERM)
    ended = started.wait()
    assert ended.code == PREEMPTED, ended.output
    step = len(steps_of(tmp_path))
    assert manifest.verify(tmp_path / f"checkpoint-{step}") is None
