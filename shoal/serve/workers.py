"""The processes that share a file of prompts: each is given one block after another and writes its part.

A worker ends when its stdin does, so that none outlives the command that started it.
"""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UserError
from shoal.serve.generate import JOB, GenerateOptions, part, write_whole

PACKAGE_ROOT = Path(__file__).parents[2]


def complete(parts: Path, blocks: Sequence[int], processes: int) -> Iterator[int]:
    """Write the parts of `blocks` of the job in `parts`; yields each block's number as it is finished.

    Raises the UserError of the first block that fails.
    """
    crew = [_start(parts) for _ in range(min(processes, len(blocks)))]
    try:
        yield from _hand_out(crew, iter(blocks))
    finally:
        for worker in crew:
            worker.kill()
        for worker in crew:
            worker.communicate()


def _start(parts: Path) -> subprocess.Popen[str]:
    # One thread: a product on more could differ in its last bits, and with it the text.
    roots = filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.serve.workers", str(parts)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _hand_out(crew: list[subprocess.Popen[str]], blocks: Iterator[int]) -> Iterator[int]:
    with selectors.DefaultSelector() as answers:
        for worker in crew:
            answers.register(_pipe(worker.stdout), selectors.EVENT_READ, worker)
            _ask(worker, next(blocks))
        while answers.get_map():
            for key, _ in answers.select():
                yield _answer(key.data)
                block = next(blocks, None)
                if block is None:
                    answers.unregister(key.fileobj)
                else:
                    _ask(key.data, block)


def _ask(worker: subprocess.Popen[str], block: int) -> None:
    with suppress(BrokenPipeError):  # it has died, which shows where its answer is missed
        print(block, file=_pipe(worker.stdin), flush=True)


def _answer(worker: subprocess.Popen[str]) -> int:
    line = _pipe(worker.stdout).readline()
    if not line:
        raise ShoalError(f"a generating process ended with code {worker.wait()}; start again to go on")
    answer = json.loads(line)
    if isinstance(answer, int):
        return answer
    raise UserError(**answer)


def _pipe(stream: Any) -> Any:
    assert stream is not None
    return stream


def _serve(parts: Path) -> None:
    from shoal.serve.writer import Writer

    job = json.loads((parts / JOB).read_text(encoding="utf-8"))
    options = GenerateOptions(**job["options"])
    writer = Writer(options)
    for line in sys.stdin:
        block = int(line)
        first = block * options.batch_size
        prompts = job["prompts"][first : first + options.batch_size]
        rows = [
            {"index": first + offset, "prompt": prompt, "completion": completion}
            for offset, (prompt, completion) in enumerate(
                zip(prompts, writer.complete(prompts, block), strict=True)
            )
        ]
        write_whole(part(parts, block), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(block, flush=True)


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]))
    except UserError as error:
        print(json.dumps({"asked": error.asked, "found": error.found, "change": error.change}), flush=True)
