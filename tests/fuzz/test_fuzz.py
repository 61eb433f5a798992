"""Whatever is given, `shoal` ends: done, or in one line, without a traceback, and what was there is as it was.

`make fuzz` runs 500 of these and 30 whole launches, the suite 40 and one. One of them again:
`pytest tests/fuzz --mutations 500 -k "mutated[123]"`.
"""

import hashlib
import os
import re
import shutil
from functools import partial
from pathlib import Path
from random import Random

import pytest
from fuzz import subjects
from laws.launches import shoal
from laws.pool import Outcome, Pool

from shoal.errors import BAD_INPUT, DONE, FAILED

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
MADE_HERE = ("out", "cache", "runs")  # what the command makes
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def in_process(folder: Path, words: list[str]) -> None:
    """The command line, up to where workers would be started."""
    from shoal.engines import local

    local.Workers = lambda *args, **kwargs: NothingToWaitFor()  # type: ignore[assignment, misc]
    whole(folder, words)


class NothingToWaitFor:
    """In the place of the processes of a launch."""

    def pass_on(self, number: int, frame: object) -> None: ...

    def run(self) -> None: ...


def whole(folder: Path, words: list[str]) -> None:
    """The command line, with its workers."""
    os.chdir(folder)
    os.environ.update(OFFLINE)
    shoal(words)


def contents(folder: Path) -> dict[str, str]:
    """The hash of each file that the command did not make."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if not (name := path.relative_to(folder).as_posix()).startswith(MADE_HERE)
    }


@pytest.fixture(scope="session")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one piece."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "t.txt").write_text("\n".join(subjects.TEXTS))
    words = ["--data", "t.txt", "--cache-dir", "cache", "--output-dir", "run", *subjects.SMALL]
    outcome = pool.alone(whole, folder, ["train", *words, "--eval-fraction=0.1"])
    assert outcome.code == DONE, outcome.output
    return folder / "run" / "checkpoint-2"


def check(outcome: Outcome, folder: Path, words: list[str], before: dict[str, str]) -> None:
    """It ended as commands may, said why in one line if it did not do what was asked, and changed no input."""
    said = f"{words}\n{outcome.output}{outcome.trace}"
    assert outcome.code in (DONE, FAILED, BAD_INPUT), said
    assert "Traceback" not in said, said
    if outcome.code != DONE:
        assert outcome.output.splitlines()[-1].startswith("shoal: error: ") or words[0] == "audit", said
    assert not CONTROL.search(outcome.output), repr(outcome.output)
    assert contents(folder) == before, said


def test_mutated(mutations: int, saved: Path, pool: Pool, tmp_path: Path) -> None:
    random = Random(mutations)
    damaged = partial(subjects.checkpoint, source=saved)
    kinds = (subjects.recipe, subjects.setting, subjects.command, subjects.data, subjects.data, damaged)
    words = kinds[mutations % len(kinds)](random, tmp_path)
    before = contents(tmp_path)
    check(pool.alone(in_process, tmp_path, words), tmp_path, words, before)


def test_launched(launches: int, saved: Path, pool: Pool, tmp_path: Path) -> None:
    random = Random(f"launch {launches}")
    small = ["--cache-dir=cache", "--output-dir=out", *subjects.SMALL, random.choice(subjects.OFTEN)]
    if launches % 3 == 0:
        data = subjects.data(random, tmp_path)
        words = ["train", *data[1:3], *small]
    else:
        shutil.copytree(saved.parents[1] / "cache", tmp_path / "cache")
        (tmp_path / "t.txt").write_text("\n".join(subjects.TEXTS))
        words = ["train", "--data=t.txt", *small]
        if launches % 3 == 1:
            chosen = subjects.checkpoint(random, tmp_path, saved)[1]
            words += [f"--resume-from-checkpoint={chosen}", "--max-steps=3"]
        else:
            words += subjects.setting(random, tmp_path)[3:]
            words += ["--max-steps=2", "--nproc-per-node=2"]
    before = contents(tmp_path)
    check(pool.alone(whole, tmp_path, words), tmp_path, words, before)
