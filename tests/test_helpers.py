"""Every number is answered once, by whichever helper; what goes wrong in one is raised here, and none is left."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shoal.errors import ShoalError, UserError
from shoal.system import helpers

HELPER = """
import os, signal, sys, time
from shoal.system import helpers
from shoal.errors import UserError

def begin(word):
    if word == "unreadable":
        raise UserError("word", "it is unreadable", "write it again")

    def work(number):
        if word == "full" and number == 2:
            raise OSError(28, "No space left on device")
        if word == "torn" and number == 2:
            os.write(1, b'{"answer": [')
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "slow":
            print("at work", file=sys.stderr, flush=True)
            time.sleep(60)
        return [word, number, os.environ["MARK"]]

    return work

helpers.serve(begin)
"""


@pytest.fixture(autouse=True)
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that helpers find only where this process would."""
    (tmp_path / "a_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)


def answers(word: str, processes: int = 2) -> list[object]:
    return list(helpers.hand_out("a_helper", word, range(7), processes, MARK="here"))


@pytest.mark.parametrize("processes", [1, 3, 20])
def test_every_number_is_answered_once(processes: int) -> None:
    assert sorted(answers("word", processes)) == [["word", number, "here"] for number in range(7)]


def running() -> list[psutil.Process]:
    """The helpers of this process that are alive; other tests may have processes of their own."""
    children = psutil.Process(os.getpid()).children()
    return [each for each in children if "a_helper" in " ".join(each.cmdline())]


def test_no_number_starts_no_helper() -> None:
    assert not list(helpers.hand_out("nowhere", "", [], 2))


def test_what_goes_wrong_is_raised_here() -> None:
    with pytest.raises(UserError, match=r"^word: it is unreadable; write it again$"):
        answers("unreadable")
    with pytest.raises(OSError, match="No space left on device") as full:
        answers("full")
    assert full.value.errno == 28
    with pytest.raises(ShoalError, match="a process of a_helper ended with code -9"):
        answers("torn")
    assert not running()


def test_none_is_left_where_the_asker_stops_early() -> None:
    asked = helpers.hand_out("a_helper", "word", range(7), 2, MARK="here")
    next(asked)
    assert len(running()) == 2
    asked.close()
    assert not running()


def test_no_helper_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = f"import sys; sys.path[:0] = [{str(helpers.PACKAGE_ROOT)!r}, {str(tmp_path)!r}]; "
    program += "from shoal.system import helpers; "
    program += "list(helpers.hand_out('a_helper', 'slow', range(7), 2, MARK='here'))"
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    with parent:
        assert parent.stderr is not None
        said = b""
        while said.count(b"at work") < 2:  # two that write at once may do so on one line
            said += (line := parent.stderr.readline())
            assert line, said
        started = psutil.Process(parent.pid).children()
        parent.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
    for process in alive:
        process.kill()
    assert len(started) == 2
    assert not alive
