"""What is printed never decides over what is computed; what was asked for arrives or is an error."""

import os
import subprocess
import sys
from typing import Any

import pytest

PRINTS = """
import os, sys
from shoal.system import output
output.forgive()
print("今天 \\udcff", flush=True)
os.write(1, b"x")
print("more", flush=True)
print(f"stderr {output.lost()}", file=sys.stderr)
"""


def run(code: str, shell: str = '"$P" -c "$CODE"', **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Python ($P) with this code, as a shell starts it."""
    env = {**os.environ, "P": sys.executable, "CODE": code, "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(["bash", "-c", shell], env=env, timeout=60, **pipes)


@pytest.fixture
def unread():
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("", b"None"),
        (">/dev/full", b"[Errno 28] No space left on device"),
        ("", b"[Errno 32] Broken pipe"),
        (">&-", b"None"),
    ],
)
def test_a_process_prints_to_whatever_there_is(where: str, why: bytes, unread: int) -> None:
    broken = {"stdout": unread} if b"pipe" in why else {}
    done = run(PRINTS, f'"$P" -c "$CODE" {where}', **broken)
    assert (done.returncode, done.stderr) == (0, b"stderr " + why + b"\n")
    if not where and not broken:
        assert done.stdout == b"\\u4eca\\u5929 \\udcff\nxmore\n"


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_stderr_may_be_gone_too(where: str) -> None:
    done = run(PRINTS, f'"$P" -c "$CODE" {where}')
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"xmore\n")


def test_what_is_set_not_to_wait_is_waited_for() -> None:
    code = f"""
import os
from shoal.system import output
os.set_blocking(1, False)
output.forgive()
print("x" * {1 << 20}, flush=True)
assert output.lost() is None
"""
    assert len(run(code, '"$P" -c "$CODE" | cat').stdout) == (1 << 20) + 1


def test_no_file_takes_the_place_of_a_closed_stdout() -> None:
    code = "import os; from shoal.system import output; output.forgive(); assert os.open('/dev/null', 0) > 2"
    assert run(code, '"$P" -c "$CODE" <&- >&- 2>&-').returncode == 0


def test_a_result_arrives_or_is_an_error(unread: int) -> None:
    done = run("", '"$P" -m shoal config schema', stdout=unread)
    assert (done.returncode, done.stderr) == (0, b"")
    done = run("", '"$P" -m shoal config show >/dev/full')
    assert done.returncode == 1
    assert done.stderr.startswith(b"shoal: error: stdout: No space left on device")
    assert done.stderr.count(b"\n") == 1
