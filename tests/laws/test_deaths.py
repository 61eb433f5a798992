"""Law 10 where it promises most: a killed worker leaves the others running, to the end of the real command."""

import json
from pathlib import Path

import pytest
from laws.launches import BATCH, Fault, shoal, steps_of, weights_of
from laws.pool import Pool

from shoal import checkpoint
from shoal.errors import DONE, FAILED

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


@pytest.mark.parametrize(
    ("phase", "step"), [("forward", 5), ("exchange", 5), ("evaluate", 5), ("observe", 7)]
)
@pytest.mark.parametrize("chosen", SPARING)
def test_the_others_train_evaluate_and_save_to_the_end(
    pool: Pool, data: list[str], tmp_path: Path, chosen: str, phase: str, step: int
) -> None:
    words = ["train", *data, *SPARING[chosen], "--output-dir", str(tmp_path), *COMMON]
    ended = pool.alone(shoal, words, Fault("kill", 2, step, phase))
    assert ended.code == DONE, ended.output
    (said,) = [line for line in ended.output.splitlines() if "worker 2" in line]
    assert "go on" in said
    assert len(steps_of(tmp_path)) == STEPS
    assert checkpoint.verify(tmp_path / f"checkpoint-{STEPS}") is None
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    assert last["eval/loss"] < 6
    assert weights_of(tmp_path)
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
