"""The built-in corpus from text to token shards, against `tokenizers` encoding the same texts in memory.

Each is timed in a process of its own: `python -m bench.tokenizing shoal TOKENIZER FOLDER`, or `alone`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.jobs import Corpus


def both_seconds(corpus: Corpus) -> tuple[float, float]:
    """The seconds that shoal takes, and those of `tokenizers` alone."""
    ours, alone = (_in_a_process(who, corpus) for who in ("shoal", "alone"))
    return ours, alone


def shoal_seconds(tokenizer: Path, cache: Path) -> float:
    """From listing the sources to a finished folder of token shards; no tokenizer is trained."""
    from shoal.config import RunConfig
    from shoal.data.prepare import prepare

    data = RunConfig.model_validate({"data": {"path": ["builtin"], "cache_dir": str(cache)}}).data
    began = time.perf_counter()
    prepare(data, str(tokenizer), report=lambda said: None)
    return time.perf_counter() - began


def alone_seconds(tokenizer: Path) -> float:
    """One call of `encode_batch_fast` for all texts, on all cores."""
    from shoal.data.documents import read_documents
    from shoal.data.sources import list_sources
    from shoal.data.tokenizer import open_fast
    from shoal.data.units import cut_units

    fast = open_fast(tokenizer)
    spans = (span for unit in cut_units(list_sources(["builtin"]).parts) for span in unit)
    texts = [text for span in spans for text in read_documents(span, "text")]
    began = time.perf_counter()
    fast.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - began


def _in_a_process(who: str, corpus: Corpus) -> float:
    with TemporaryDirectory(dir=corpus.work) as cache:
        command = [sys.executable, "-m", "bench.tokenizing", who, str(corpus.tokenizer), cache]
        parallel = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
        return float(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=parallel).stdout
        )


if __name__ == "__main__":
    who, tokenizer, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print(shoal_seconds(tokenizer, cache) if who == "shoal" else alone_seconds(tokenizer))
