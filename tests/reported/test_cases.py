"""The table of cases, each by its command in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from laws.launches import shoal
from laws.pool import HANG, Pool
from reported.inputs import common
from reported.table import DATA, MODELS, OUTPUT, SETTINGS, Case

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def in_folder(folder: Path, words: list[str], environ: dict[str, str]) -> None:
    """`shoal` as a process of the pool, in a folder."""
    os.chdir(folder)
    os.environ.update(OFFLINE | environ)
    shoal(words)


def as_line(folder: Path, line: str, environ: dict[str, str]) -> tuple[int, str]:
    """A line for a shell, for which every process is started anew: its exit code and output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, env=os.environ | OFFLINE | {"PATH": path} | environ,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=2 * HANG,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(errors="replace")


@pytest.mark.parametrize("case", [*DATA, *MODELS, *SETTINGS, *OUTPUT], ids=lambda case: case.name)
def test_case(case: Case, pool: Pool, tmp_path: Path) -> None:
    common(tmp_path)
    case.make(tmp_path)
    environ = {name: value.replace("HERE", str(tmp_path)) for name, value in case.environ.items()}
    if case.line:
        code, output = as_line(tmp_path, case.line, environ)
    else:
        outcome = pool.alone(in_folder, tmp_path, shlex.split(case.words), environ)
        code, output = outcome.code, outcome.output
    assert code == case.code, output
    assert "Traceback" not in output
    assert "\0" not in output
    for pattern in case.says:
        assert re.search(pattern, output), output
    case.check(tmp_path, output)
