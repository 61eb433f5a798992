"""From sources to a prepared corpus in the cache: found again by content, continued after a kill."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from shoal.config import DataConfig
from shoal.data import pool, shards, summary, tokenizer
from shoal.data.cache import cache_errors, folder_of, made
from shoal.data.documents import read_documents
from shoal.data.fingerprints import fingerprints
from shoal.data.shards import Shard, content_hash, held_out
from shoal.data.sources import Part, list_sources
from shoal.data.units import JOB, Job, Unit, bytes_of, cut_units
from shoal.errors import UserError
from shoal.system.devices import usable_cores
from shoal.system.locks import Report
from shoal.system.output import say

TRAIN = "train"  # the tokenizer to be trained on the data
TRAINING_SAMPLE_BYTES = 16 << 20  # a BPE of a few thousand entries gains nothing from more
CHECK_SAMPLE_CHARACTERS = 64 << 10
JOURNAL = "finished.jsonl"  # the shards that are whole, while others are still to be written
POOL_FROM_BYTES = 64 << 20  # below, starting processes costs more than they save over threads


def prepare(
    data: DataConfig,
    tokenizer_name: str = TRAIN,
    report: Report = say,
    processes: int | None = None,
    verbose: bool = False,
) -> Path:
    """The folder of token shards of `data`, made where the cache does not hold it yet.

    `tokenizer_name` is "train" (a BPE of `data.vocab_size`) or a tokenizer's folder or hub name. What comes
    out does not depend on `processes` (default: all cores, where there is work for them). Processes that ask
    for the same data wait for the first. What was read and what left out is reported where the folder is made, with
    `verbose` also where it is found. Raises UserError for bad input, and for a cache that cannot be written.
    """
    cache = folder_of(data.cache_dir)
    sources, eval_sources = list_sources(data.path), list_sources(data.eval_path, "--eval-path")
    given = _Given(data, sources.parts, eval_sources.parts)
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        recipe = given.recipe(cache, report)
        if tokenizer_name == TRAIN:
            trained = cache / "tokenizers" / _key(recipe, data.vocab_size)
            made(trained, partial(_train, given, report), report)
        else:
            trained = tokenizer.fetch(tokenizer_name, cache / "tokenizers", report)
        key = _key(recipe, tokenizer.fingerprint(trained), data.split_special_tokens)
        corpus, began = cache / "corpora" / key, time.monotonic()
        is_new = made(corpus, partial(_build, given, trained, report, processes), report)
    index = shards.load_index(corpus)
    if is_new:
        seconds, total = time.monotonic() - began, summary.totals(index)
        made_of = f"{total['documents']:,} documents, {total['tokens']:,} tokens"
        report(f"prepared {made_of} in {seconds:.1f} s: {corpus}")
    for line in summary.lines(index, sources.left_out + eval_sources.left_out) if is_new or verbose else ():
        report(line)
    return corpus


@dataclass(frozen=True)
class _Given:
    """The files to prepare, and how."""

    data: DataConfig
    parts: list[Part]
    eval_parts: list[Part]

    @property
    def fraction(self) -> float:
        """The share of the documents to hold out."""
        return 0.0 if self.eval_parts else float(self.data.eval_fraction)

    def recipe(self, cache: Path, report: Report) -> list[object]:
        """All that the documents and their split follow from."""
        digests = fingerprints([*self.parts, *self.eval_parts], cache, report)
        content = [
            [part.format, digest] for part, digest in zip(self.parts + self.eval_parts, digests, strict=True)
        ]
        here = len(self.parts)
        return [shards.FORMAT, content[:here], content[here:], self.data.text_field, self.fraction]


def _train(given: _Given, report: Report, folder: Path) -> None:
    """Train a BPE on a sample of the documents that are trained on."""
    began = time.monotonic()
    texts = _sample(cut_units(given.parts), given.data.text_field, TRAINING_SAMPLE_BYTES)
    hashes = np.array([content_hash(text.encode()) for text in texts], np.int64)
    kept = ~held_out(hashes, given.fraction)
    _refuse_none(int(kept.sum()), given.parts)
    tokenizer.train_bpe(
        (text for text, keep in zip(texts, kept, strict=True) if keep), given.data.vocab_size, folder
    )
    seconds = time.monotonic() - began
    report(f"trained a tokenizer on {int(kept.sum()):,} documents in {seconds:.1f} s")


def _build(
    given: _Given, tokenizer_folder: Path, report: Report, processes: int | None, building: Path
) -> None:
    """Write the token shards, then the splits and the index."""
    train_units, eval_units = cut_units(given.parts), cut_units(given.eval_parts)
    split_special = given.data.split_special_tokens
    fast = tokenizer.open_fast(tokenizer_folder, split_special)
    _check_sample(fast, train_units, given.data.text_field, tokenizer_folder)
    prefix, suffix = tokenizer.boundary(tokenizer.special_ids(tokenizer_folder))
    size = tokenizer.vocab_size(fast)
    job = Job(
        units=[*train_units, *eval_units],
        text_field=given.data.text_field,
        tokenizer=str(tokenizer_folder),
        split_special_tokens=split_special,
        prefix=prefix,
        suffix=suffix,
        dtype=shards.token_dtype(size),
    )
    building.mkdir(parents=True, exist_ok=True)
    for leftover in building.glob(f"*{shards.UNFINISHED}"):
        leftover.unlink()
    job.save(building / JOB)
    written = _write_shards(job, building, report, processes)
    chosen = held_out(shards.all_hashes(building, written), given.fraction)
    if eval_units:
        is_eval = np.arange(len(written)) >= len(train_units)
        chosen = np.repeat(is_eval, [shard.documents for shard in written])
    _refuse_none(int((~chosen).sum()), given.parts)
    if given.eval_parts:
        _refuse_none(int(chosen.sum()), given.eval_parts)
    splits = shards.write_splits(building, written, chosen)
    tokenizer.copy_files(tokenizer_folder, building / "tokenizer")
    facts = {
        "vocab_size": size,
        "dtype": job.dtype,
        "prefix": prefix,
        "suffix": suffix,
        "split_special_tokens": split_special,
        "tokenizer_sha256": tokenizer.fingerprint(tokenizer_folder),
        "files": len(given.parts) + len(given.eval_parts),
    }
    shards.write_index(building, written, splits, facts)
    (building / JOB).unlink()
    (building / JOURNAL).unlink()


def _write_shards(job: Job, building: Path, report: Report, processes: int | None) -> list[Shard]:
    """All shards of the job; those that an earlier, killed run finished are in its journal and stay."""
    journal = building / JOURNAL
    finished = {shard.number: shard for shard in _read_journal(journal)}
    missing = [number for number in range(len(job.units)) if number not in finished]
    todo = sum(bytes_of(job.units[number]) for number in missing)
    if finished:
        report(f"{len(finished)} of {len(job.units)} token shards are there already")
    if processes is None:
        processes = usable_cores() if todo >= POOL_FROM_BYTES else 1
    with journal.open("a") as log, _progress(todo) as advance:
        log.write("\n")  # ends a torn line
        for shard in pool.tokenize(job, building, missing, processes):
            log.write(json.dumps(asdict(shard)) + "\n")
            log.flush()
            finished[shard.number] = shard
            advance(bytes_of(job.units[shard.number]))
    return [finished[number] for number in range(len(job.units))]


def _read_journal(journal: Path) -> Iterator[Shard]:
    for line in journal.read_text().splitlines() if journal.is_file() else []:
        with suppress(json.JSONDecodeError):  # blank, or torn by a kill
            yield Shard(**json.loads(line))


def _sample(units: Sequence[Unit], text_field: str, wanted_bytes: int) -> list[str]:
    """The first documents of evenly spaced units, about `wanted_bytes` in all."""
    chosen = units[:: max(1, len(units) // 64)]
    whole = sum(map(bytes_of, units)) <= wanted_bytes
    texts = []
    for unit in chosen:
        left = wanted_bytes // len(chosen)
        for text in (text for span in unit for text in read_documents(span, text_field)):
            if not whole and left <= 0:
                break
            texts.append(text)
            left -= len(text)
    return texts


def _check_sample(fast: object, units: Sequence[Unit], text_field: str, folder: Path) -> None:
    some = units[:: -(-len(units) // 4)]
    texts = [text[:4096] for text in _sample(some, text_field, CHECK_SAMPLE_CHARACTERS)]
    tokenizer.check_match(fast, texts, str(folder))


def _refuse_none(documents: int, parts: Sequence[Part]) -> None:
    if not documents:
        raise UserError(parts[0].asked, "no documents: every text is empty", "name files that hold text")


def _key(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda step: bar.advance(task, step)
