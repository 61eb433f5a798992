"""From sources to a prepared corpus in the cache: found again by content, continued after a kill."""

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from shoal.config import DataConfig, cache_folder, usable_cores
from shoal.data import pool, shards, tokenizer
from shoal.data.documents import read_documents
from shoal.data.shards import Shard, content_hash, held_out
from shoal.data.sources import Part, fingerprint, list_parts
from shoal.data.units import JOB, Job, Unit, bytes_of, cut_units
from shoal.errors import UserError

TRAIN = "train"  # the tokenizer to be trained on the data
TRAINING_SAMPLE_BYTES = 16 << 20  # a BPE of a few thousand entries gains nothing from more
CHECK_SAMPLE_CHARACTERS = 64 << 10
JOURNAL = "finished.jsonl"  # the shards that are whole, while others are still to be written
POOL_FROM_BYTES = 64 << 20  # below, starting processes costs more than they save over threads

Report = Callable[[str], None]


def say(text: str) -> None:
    """Print a line where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


def prepare(
    data: DataConfig, tokenizer_name: str = TRAIN, report: Report = say, processes: int | None = None
) -> Path:
    """The folder of token shards of `data`, made where the cache does not hold it yet.

    `tokenizer_name` is "train" (a BPE of `data.vocab_size`) or a tokenizer's folder or hub name. What comes
    out does not depend on `processes` (default: all cores, where there is work for them). Processes that ask
    for the same data wait for the first. Raises UserError for bad input, and where the disk is full.
    """
    cache = cache_folder(data)
    parts, eval_parts = list_parts(data.path), list_parts(data.eval_path, "--eval-path")
    content = [[part.format, fingerprint(part)] for part in parts]
    eval_content = [[part.format, fingerprint(part)] for part in eval_parts]
    fraction = 0.0 if eval_parts else float(data.eval_fraction)
    recipe = [shards.FORMAT, content, eval_content, data.text_field, fraction]
    _make(cache)
    with _full_disk_is_an_error(cache):
        if tokenizer_name == TRAIN:
            name = _key(recipe, data.vocab_size)
            folder = _trained(cache / "tokenizers" / name, parts, data, fraction, report)
        else:
            with _locked(cache / "tokenizers" / "fetch", report):
                folder = tokenizer.fetch(tokenizer_name, cache / "tokenizers")
        corpus = cache / "corpora" / _key(recipe, tokenizer.fingerprint(folder))
        with _locked(corpus, report):
            if not corpus.is_dir():
                _build(corpus, parts, eval_parts, data.text_field, fraction, folder, report, processes)
    return corpus


def _trained(folder: Path, parts: Sequence[Part], data: DataConfig, fraction: float, report: Report) -> Path:
    with _locked(folder, report):
        if not folder.is_dir():
            began = time.monotonic()
            texts = _sample(cut_units(parts), data.text_field, TRAINING_SAMPLE_BYTES)
            hashes = np.array([content_hash(text.encode()) for text in texts], np.int64)
            kept = ~held_out(hashes, fraction)
            _refuse_none(int(kept.sum()), parts)
            aside = folder.with_suffix(".building")
            training = (text for text, keep in zip(texts, kept, strict=True) if keep)
            tokenizer.train_bpe(training, data.vocab_size, aside)
            aside.rename(folder)
            seconds = time.monotonic() - began
            report(f"trained a tokenizer on {int(kept.sum()):,} documents in {seconds:.1f} s")
    return folder


def _build(
    corpus: Path,
    parts: Sequence[Part],
    eval_parts: Sequence[Part],
    text_field: str,
    fraction: float,
    tokenizer_folder: Path,
    report: Report,
    processes: int | None,
) -> None:
    """Write the token shards beside `corpus`, then the splits and the index, and move all into place."""
    began = time.monotonic()
    train_units, eval_units = cut_units(parts), cut_units(eval_parts)
    fast = tokenizer.open_fast(tokenizer_folder)
    _check_sample(fast, train_units, text_field, tokenizer_folder)
    prefix, suffix = tokenizer.boundary(tokenizer.special_ids(tokenizer_folder))
    size = fast.get_vocab_size()
    dtype = shards.token_dtype(size)
    job = Job([*train_units, *eval_units], text_field, str(tokenizer_folder), prefix, suffix, dtype)
    building = corpus.with_suffix(".building")
    building.mkdir(parents=True, exist_ok=True)
    for leftover in building.glob(f"*{shards.UNFINISHED}"):
        leftover.unlink()
    job.save(building / JOB)
    written = _write_shards(job, building, report, processes)
    hashes = shards.all_hashes(building, written)
    chosen = held_out(hashes, fraction)
    if eval_units:
        is_eval = np.arange(len(written)) >= len(train_units)
        chosen = np.repeat(is_eval, [shard.documents for shard in written])
    _refuse_none(int((~chosen).sum()), parts)
    if eval_parts:
        _refuse_none(int(chosen.sum()), eval_parts)
    splits = shards.write_splits(building, written, chosen)
    tokenizer.copy_files(tokenizer_folder, building / "tokenizer")
    facts = {
        "vocab_size": size,
        "dtype": dtype,
        "prefix": prefix,
        "suffix": suffix,
        "tokenizer_sha256": tokenizer.fingerprint(tokenizer_folder),
    }
    shards.write_index(building, written, splits, facts)
    (building / JOB).unlink()
    (building / JOURNAL).unlink()
    building.rename(corpus)
    seconds, total = time.monotonic() - began, sum(shard.tokens for shard in written)
    report(f"prepared {len(hashes):,} documents, {total:,} tokens in {seconds:.1f} s: {corpus}")


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
def _locked(target: Path, report: Report) -> Iterator[None]:
    """Only one process makes `target`; a killed process's lock is free once its helpers have ended too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("a+") as lock:
        os.set_inheritable(lock.fileno(), True)  # by helpers, which write on for a second after a kill
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            if lock.read() != str(os.getppid()):  # the workers of one run have the same parent
                report("waiting for another process that prepares the same data")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getppid()))
        lock.flush()
        yield


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


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"it cannot be made ({error.strerror})"
        raise UserError(
            f"--cache-dir {cache}", found, "name a folder on a disk that can be written"
        ) from error


@contextmanager
def _full_disk_is_an_error(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        change = "free some space, or name another"
        raise UserError(f"--cache-dir {cache}", "the disk is full", change) from error
