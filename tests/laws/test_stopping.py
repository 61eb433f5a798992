"""Law 10, the table: stop and kill at every phase, under every layout and strategy.

A stop ends in exit code 75, with a checkpoint from which the run goes on to the numbers of the one that nothing
happened to, and with the same samples, each once. A kill ends in one line that names the worker, and goes on likewise
from the last checkpoint. Neither ends in a hang: the pool of processes has a deadline.

The cases are a cover and no product. What a phase asks of a column:

- evaluation: of each layout, since ranks that compute a micro-batch together leave it together; and of each way to
  agree: a sum (the layouts), a sum of pairs (gossip), and rank 0 alone (async, a quorum), which hears of it or tells
- a step: of each strategy, since each has its own exchange that a rank could be missing from
- save: of each form of a checkpoint: whole (replicated), in pieces (tp), in parts of every rank (gossip)
- final evaluation, and finishing: of a pipeline, and of servers, where the others wait or have ended
- start and export: once, since nothing of a column has begun, or is left

A signal reaches one worker, as under torchrun or Slurm, or the launcher. Who dies without the others ending is in
`test_deaths`.
"""

from pathlib import Path

import pytest
from laws.launches import BATCH, Fault, flags, ledger_of, losses_of, shoal, weights_of
from laws.pool import Outcome, Pool
from laws.worlds import first_difference

from shoal import checkpoint
from shoal.errors import DONE, FAILED, PREEMPTED
from shoal.system import manifest

SAVED, EVALUATED = 4, 3  # every so many steps
RESUME = ["--resume-from-checkpoint", "latest"]
COLUMNS = {
    "replicated": [],
    "zero3": ["--strategy", "zero3"],
    "tp": ["--tp", "2"],
    "pp": ["--pp", "2", "--model.num-hidden-layers", "2"],
    "cp": ["--cp", "2"],
    **{name: flags(name) for name in ("local", "diloco", "noloco", "gossip", "demo", "server")},
    "quorum": ["--strategy", "server", "--quorum", "2"],
    "async": ["--strategy", "async", "--max-staleness", "1"],
}
APART = ("quorum", "async")  # where ranks do not wait for each other, and other runs have other numbers
MORE = 6  # steps that these take at most before all have stopped

STOPS = [
    ("replicated", "forward", 4, 1, "launcher"),
    ("replicated", "save", 3, 0, "worker"),
    ("zero3", "exchange", 4, 1, "worker"),
    ("zero3", "measure", 5, 1, "worker"),
    ("tp", "save", 3, 0, "worker"),
    ("tp", "measure", 5, 1, "worker"),
    ("pp", "measure", 2, 0, "worker"),
    ("pp", "measure", 7, 1, "worker"),  # the final evaluation
    ("cp", "forward", 2, 0, "launcher"),
    ("cp", "measure", 5, 1, "worker"),
    ("local", "exchange", 4, 1, "worker"),
    ("diloco", "measure", 5, 0, "launcher"),
    ("noloco", "update", 4, 1, "worker"),
    ("gossip", "save", 3, 0, "worker"),
    ("gossip", "measure", 5, 1, "worker"),
    ("demo", "observe", 4, 0, "worker"),
    ("server", "exchange", 4, 1, "worker"),
    ("server", "measure", 7, 0, "worker"),
    ("quorum", "exchange", 4, 1, "worker"),
    ("quorum", "measure", 5, 0, "peer"),
    ("async", "forward", 4, 1, "worker"),
    ("async", "measure", 5, 0, "worker"),
    ("async", "finish", 23, 1, "worker"),
]
KILLS = [
    ("replicated", "backward", 4, 1),
    ("zero3", "update", 5, 0),
    ("tp", "forward", 4, 1),
    ("pp", "measure", 5, 1),
    ("cp", "save", 7, 0),
    ("local", "observe", 5, 1),
    ("diloco", "exchange", 4, 0),
    ("server", "exchange", 5, 1),
]


def steps_in(column: str) -> int:
    return 24 if column in APART else 8


def train(
    pool: Pool, data: list[str], run: Path, column: str, *more: str, fault: Fault | None = None
) -> Outcome:
    words = [
        "train",
        *data,
        *BATCH,
        *COLUMNS[column],
        "--nproc-per-node",
        "2",
        "--balance",
        "off",
        "--ledger",
    ]
    words += ["--max-steps", str(steps_in(column)), "--output-dir", str(run), *more]
    words += ["--save-steps", str(SAVED), "--eval-steps", str(EVALUATED)]
    return pool.alone(shoal, words, fault)


class Undisturbed(dict[str, Path]):
    """The folder of the run of a column that nothing happened to, made when first asked for."""

    def __init__(self, pool: Pool, data: list[str], folder: Path) -> None:
        self.made = pool, data, folder

    def __missing__(self, column: str) -> Path:
        pool, data, folder = self.made
        self[column] = folder / column
        done = train(pool, data, self[column], column)
        assert done.code == DONE, done.output
        return self[column]


@pytest.fixture(scope="module")
def undisturbed(pool: Pool, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(pool, data, tmp_path_factory.mktemp("undisturbed"))


def the_line(outcome: Outcome) -> str:
    """The only line that says how it ended."""
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("shoal: ")]
    return line


def assert_goes_on(pool: Pool, data: list[str], run: Path, column: str, whole: Path) -> None:
    resumed = train(pool, data, run, column, *RESUME)
    assert resumed.code == DONE, resumed.output
    assert ledger_of(run) == ledger_of(whole)
    assert len(losses_of(run)) == steps_in(column)
    if column not in APART:
        assert losses_of(run) == losses_of(whole)
        assert first_difference([weights_of(whole)], [weights_of(run)]) is None


@pytest.mark.parametrize(("column", "phase", "step", "rank", "to"), STOPS)
def test_a_stop_saves_and_leaves(
    pool: Pool,
    data: list[str],
    tmp_path: Path,
    undisturbed: Undisturbed,
    column: str,
    phase: str,
    step: int,
    rank: int,
    to: str,
) -> None:
    left = train(pool, data, tmp_path, column, fault=Fault("sigterm", rank, step, phase, to))
    assert left.code == PREEMPTED, left.output
    assert "--resume-from-checkpoint latest" in the_line(left)
    assert "Traceback" not in left.output
    steps = len(losses_of(tmp_path))
    more = MORE if column in APART else {"observe": 1, "save": 2}.get(phase, 0)
    assert step + 1 <= steps <= step + 1 + more
    assert checkpoint.load_progress(tmp_path / f"checkpoint-{steps}").step == steps
    for path in checkpoint.candidates(tmp_path):
        assert manifest.verify(path) is None
    assert_goes_on(pool, data, tmp_path, column, undisturbed[column])


@pytest.mark.parametrize(("column", "phase", "step", "rank"), KILLS)
def test_a_kill_is_one_line_and_loses_no_checkpoint(
    pool: Pool,
    data: list[str],
    tmp_path: Path,
    undisturbed: Undisturbed,
    column: str,
    phase: str,
    step: int,
    rank: int,
) -> None:
    killed = train(pool, data, tmp_path, column, fault=Fault("kill", rank, step, phase))
    assert killed.code == FAILED, killed.output
    assert f"worker {rank} was killed by SIGKILL" in the_line(killed)
    whole = undisturbed[column]
    done = losses_of(tmp_path)
    assert done == losses_of(whole)[: len(done)]
    assert len(done) >= step - 1
    assert_goes_on(pool, data, tmp_path, column, whole)


@pytest.mark.parametrize(("phase", "to"), [("join", "worker"), ("join", "launcher"), ("start", "worker")])
def test_a_stop_before_the_first_step_says_that_there_is_nothing_to_save(
    pool: Pool, data: list[str], tmp_path: Path, phase: str, to: str
) -> None:
    """Also where one worker has had it, and the others, who have begun, miss that one."""
    left = train(pool, data, tmp_path, "replicated", fault=Fault("sigterm", 1, -1, phase, to))
    assert left.code == PREEMPTED, left.output
    assert "nothing to save yet" in the_line(left)


def test_a_stop_while_exporting_finishes(pool: Pool, data: list[str], tmp_path: Path) -> None:
    left = train(pool, data, tmp_path, "replicated", fault=Fault("sigterm", 0, 7, "export"))
    assert left.code == DONE, left.output
    assert weights_of(tmp_path)
