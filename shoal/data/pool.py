"""The processes that tokenize: each is given one unit after another and answers with its token shard."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal import crew
from shoal.data.shards import Shard
from shoal.data.units import JOB, Job, UnitTokenizer


def tokenize(job: Job, folder: Path, numbers: Sequence[int], processes: int) -> Iterator[Shard]:
    """Write the token shards of the numbered units of `folder/job.json`, and yield each as it is finished.

    With one process, here and on all cores. Raises the UserError or OSError of the first unit that fails.
    """
    if processes <= 1 or len(numbers) <= 1:
        yield from map(UnitTokenizer(job, folder).write, numbers)
        return
    one_core = {"TOKENIZERS_PARALLELISM": "false"}
    for shard in crew.hand_out("shoal.data.pool", folder, numbers, processes, **one_core):
        yield Shard(**shard)


def _writer(folder: str) -> Callable[[int], dict[str, Any]]:
    tokenizer = UnitTokenizer(Job.load(Path(folder) / JOB), Path(folder))
    return lambda number: asdict(tokenizer.write(number))


if __name__ == "__main__":
    crew.serve(_writer)
