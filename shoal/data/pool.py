"""Who tokenizes: threads, or processes, each given one unit after another."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.data.shards import Shard
from shoal.data.units import JOB, Job, UnitTokenizer
from shoal.system import helpers
from shoal.system.devices import usable_cores

ONE_CORE = {"TOKENIZERS_PARALLELISM": "false"}


def tokenize(job: Job, folder: Path, numbers: Sequence[int], processes: int) -> Iterator[Shard]:
    """Write the token shards of the numbered units of `folder/job.json`, and yield each as it is finished.

    One process is this one, with a thread for each core: they start at once, and share what Python itself does, which
    is a twentieth of the work. Raises the UserError or OSError of the first unit that fails.
    """
    if processes <= 1:
        with _one_core_each(), _threads() as threads:
            write = UnitTokenizer(job, folder).write
            for written in as_completed([threads.submit(write, number) for number in numbers]):
                yield written.result()
        return
    for shard in helpers.hand_out("shoal.data.pool", folder, numbers, processes, **ONE_CORE):
        yield Shard(**shard)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(usable_cores())
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def _one_core_each() -> Iterator[None]:
    """`tokenizers` reads its setting at each call, from the environment only. Two pools of threads cost a tenth."""
    before = {name: os.environ.get(name) for name in ONE_CORE}
    os.environ.update(ONE_CORE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _writer(folder: str) -> Callable[[int], dict[str, Any]]:
    tokenizer = UnitTokenizer(Job.load(Path(folder) / JOB), Path(folder))
    return lambda number: asdict(tokenizer.write(number))


if __name__ == "__main__":
    helpers.serve(_writer)
