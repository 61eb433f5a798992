"""The processes that tokenize: each is given one unit after another and answers with its token shard.

They are plain processes of this module rather than of `multiprocessing`, which would import the caller's main
module in each, and torch with it. Requests and answers are lines of JSON on their stdin and stdout.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.data.shards import Shard
from shoal.data.units import JOB, Job, UnitTokenizer
from shoal.errors import FAILED, ShoalError, UserError

PACKAGE_ROOT = Path(__file__).parents[2]


def tokenize(job: Job, folder: Path, numbers: Sequence[int], processes: int) -> Iterator[Shard]:
    """Write the token shards of the numbered units of `folder/job.json`, and yield each as it is finished.

    With one process, here and on all cores. Raises the UserError or OSError of the first unit that fails.
    """
    if processes <= 1 or len(numbers) <= 1:
        here = UnitTokenizer(job, folder)
        yield from map(here.write, numbers)
        return
    workers = [_start(folder) for _ in range(min(processes, len(numbers)))]
    try:
        yield from _hand_out(workers, iter(numbers))
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


def _start(folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE_ROOT), *filter(None, sys.path)]),
        "TOKENIZERS_PARALLELISM": "false",  # one core a process
    }
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.data.pool", str(folder), str(os.getpid())],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _hand_out(workers: list[subprocess.Popen[str]], numbers: Iterator[int]) -> Iterator[Shard]:
    with selectors.DefaultSelector() as answers:
        for worker in workers:
            answers.register(_pipe(worker.stdout), selectors.EVENT_READ, worker)
            _ask(worker, next(numbers))
        while answers.get_map():
            for key, _ in answers.select():
                yield _answer(key.data)
                number = next(numbers, None)
                if number is None:
                    answers.unregister(key.fileobj)
                else:
                    _ask(key.data, number)


def _ask(worker: subprocess.Popen[str], number: int) -> None:
    with suppress(BrokenPipeError):  # it has died, which shows where its answer is missed
        print(number, file=_pipe(worker.stdin), flush=True)


def _answer(worker: subprocess.Popen[str]) -> Shard:
    line = _pipe(worker.stdout).readline()  # whole, since a worker writes one line at once
    if not line:
        raise ShoalError(f"a tokenizing process ended with code {worker.wait()}; start again to go on")
    answer = json.loads(line)
    if "asked" in answer:
        raise UserError(**answer)
    if "errno" in answer:
        raise OSError(answer["errno"], answer["strerror"])
    return Shard(**answer)


def _pipe(stream: Any) -> Any:
    assert stream is not None
    return stream


def _serve(folder: Path, parent: int) -> None:
    _end_with(parent)
    tokenizer = UnitTokenizer(Job.load(folder / JOB), folder)
    for line in sys.stdin:
        try:
            answer = asdict(tokenizer.write(int(line)))
        except UserError as error:
            answer = {"asked": error.asked, "found": error.found, "change": error.change}
        except OSError as error:
            answer = {"errno": error.errno, "strerror": error.strerror or str(error)}
        print(json.dumps(answer), flush=True)


def _end_with(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end silently within a second of its own end, however it was killed."""

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(FAILED)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), parent=int(sys.argv[2]))
