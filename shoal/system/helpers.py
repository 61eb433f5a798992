"""Helper processes, `python -m MODULE ARGUMENT`, each of which gets one integer after another.

They are plain processes rather than those of `multiprocessing`, which would import the caller's main module in
each, and torch with it. Numbers and answers are lines on their stdin and stdout, the answers in JSON.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import FAILED, ShoalError, UserError, foreseen
from shoal.system import output

PACKAGE_ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 1


def command(module: str, *arguments: str) -> list[str]:
    """The words that start `module` as a program, which imports nothing from the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def imports() -> dict[str, str]:
    """Variables by which such a program, and what it starts, finds modules where this process does.

    Not in the current folder, though Python puts it first for `python -m`: a file there that is called like a module
    of Python's own would take its place.
    """
    here = os.path.realpath(os.curdir)
    folders = [folder for folder in sys.path if folder and os.path.realpath(folder) != here]
    return {"PYTHONPATH": os.pathsep.join([*folders, str(PACKAGE_ROOT)]), "PYTHONSAFEPATH": "1"}


def hand_out(
    module: str, argument: str | Path, numbers: Sequence[int], processes: int, **variables: str
) -> Iterator[Any]:
    """Have at most so many helpers, `module` called with `argument`, answer each number; yields as they do.

    `variables` are added to their environment. Raises the UserError or OSError of the first number that fails,
    and ShoalError where a helper dies. No helper is left when this ends.
    """
    todo = iter(numbers)
    with ExitStack() as crew, selectors.DefaultSelector() as answers:
        for _ in range(min(processes, len(numbers))):
            helper = crew.enter_context(_helper(module, str(argument), variables))
            answers.register(_pipe(helper.stdout), selectors.EVENT_READ, helper)
            _ask(helper, next(todo))
        while answers.get_map():
            for key, _ in answers.select():
                yield _answer(key.data, module)
                number = next(todo, None)
                if number is None:
                    answers.unregister(key.fileobj)
                else:
                    _ask(key.data, number)


def serve(begin: Callable[[str], Callable[[int], Any]]) -> None:
    """Be a helper: `begin(argument)` gives what answers a number, with anything that JSON can write.

    A ShoalError or OSError of either is raised again in the parent, and so is a lack of memory; any other error
    ends this process.
    """
    output.forgive()
    argument, parent = sys.argv[1:]
    _end_with(int(parent))
    begun = cache(begin)  # by the first number, whose answer can then say what went wrong
    for line in sys.stdin:
        try:
            said: dict[str, Any] = {"answer": begun(argument)(int(line))}
        except UserError as error:
            said = {"user_error": [error.asked, error.found, error.change]}
        except OSError as error:
            said = {"os_error": [error.errno, error.strerror or str(error), error.filename]}
        except Exception as error:
            if (line := foreseen(error)) is None:
                raise
            said = {"error": str(line)}
        print(json.dumps(said), flush=True)


@contextmanager
def _helper(module: str, argument: str, variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    helper = subprocess.Popen(
        command(module, argument, str(os.getpid())),
        env={**os.environ, **imports(), **variables},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,  # Python's own are not inherited; a lock that says so is held by the helper too
    )
    try:
        yield helper
    finally:
        helper.kill()
        helper.communicate()


def _ask(helper: subprocess.Popen[str], number: int) -> None:
    with suppress(BrokenPipeError):  # it has died, which shows where its answer is missed
        print(number, file=_pipe(helper.stdin), flush=True)


def _answer(helper: subprocess.Popen[str], module: str) -> Any:
    line = _pipe(helper.stdout).readline()
    if not line.endswith("\n"):
        raise ShoalError(f"a process of {module} ended with code {helper.wait()}; start again to go on")
    said = json.loads(line)
    if "user_error" in said:
        raise UserError(*said["user_error"])
    if "os_error" in said:
        raise OSError(*said["os_error"])
    if "error" in said:
        raise ShoalError(said["error"])
    return said["answer"]


def _pipe(stream: Any) -> Any:
    assert stream is not None
    return stream


def _end_with(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end silently soon after its own end, however it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(FAILED)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
