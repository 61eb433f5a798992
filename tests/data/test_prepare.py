"""Prepared data holds every document once, whoever made it and however often it was interrupted."""

import errno
import fcntl
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import Data, documents_of, files_of

from shoal.data import fingerprints, pool, shards, units
from shoal.data.prepare import prepare
from shoal.data.shards import TokenStream, content_hash, held_out
from shoal.errors import ShoalError, UserError
from shoal.system import helpers


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 3000)


def silent(line: str) -> None:
    pass


def data_at(corpus: Path, **changes: object) -> Data:
    return Data(**{"path": [str(corpus)], "cache_dir": str(corpus.parent / "cache"), **changes})


@pytest.mark.parametrize("unit_bytes", [3000, 9000, 1 << 20])
def test_the_splits_hold_every_document_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", unit_bytes)
    folder = prepare(data_at(corpus), report=silent)
    originals = [file.read_text() for file in sorted(corpus.iterdir())]
    train, kept = documents_of(folder, "train"), documents_of(folder, "eval")
    assert sorted(train + kept) == sorted(originals)
    assert train == [text for text in originals if text in train]
    hashes = np.array([content_hash(text.encode()) for text in originals])
    assert kept == [text for text, out in zip(originals, held_out(hashes, 0.1), strict=True) if out]
    for split, texts in (("train", train), ("eval", kept)):
        assert TokenStream(folder, split).bytes == sum(len(text.encode()) for text in texts)
        TokenStream(folder, split).verify()


@pytest.mark.usefixtures("many_units")
def test_one_process_and_two_make_the_same_files(corpus: Path, tmp_path: Path) -> None:
    alone = prepare(data_at(corpus, cache_dir=str(tmp_path / "one")), report=silent, processes=1)
    together = prepare(data_at(corpus, cache_dir=str(tmp_path / "two")), report=silent, processes=2)
    assert len(list(alone.glob("shard-*.bin"))) > 5
    assert files_of(alone) == files_of(together)
    assert alone.name == together.name


def test_reading_any_stretch_is_a_slice_of_the_whole(corpus: Path) -> None:
    stream = TokenStream(prepare(data_at(corpus), report=silent), "train")
    ids, owners = stream.read(0, stream.tokens)
    assert np.array_equal(stream.starts, np.flatnonzero(np.diff(owners, prepend=-1)))
    assert stream.shared_boundary
    random = np.random.default_rng(0)
    for start, stop in np.sort(random.integers(0, stream.tokens + 1, (200, 2)), axis=1).tolist():
        some_ids, some_owners = stream.read(start, stop)
        assert np.array_equal(some_ids, ids[start:stop])
        assert np.array_equal(some_owners, owners[start:stop])
    with pytest.raises(IndexError):
        stream.read(0, stream.tokens + 1)


def test_prepared_data_is_found_by_content(corpus: Path) -> None:
    lines: list[str] = []
    folder = prepare(data_at(corpus), report=lines.append)
    assert len(lines) == 3
    moved = corpus.rename(corpus.with_name("moved"))
    assert prepare(data_at(moved), report=lines.append) == folder
    assert len(lines) == 3
    (moved / "00.txt").write_text((moved / "00.txt").read_text() + "x")
    assert prepare(data_at(moved), report=lines.append) != folder
    assert len(lines) == 6


@pytest.mark.parametrize(
    "changes", [{"eval_fraction": 0.3}, {"vocab_size": 280}, {"split_special_tokens": True}]
)
def test_another_recipe_is_another_corpus(corpus: Path, changes: dict[str, object]) -> None:
    assert prepare(data_at(corpus), report=silent) != prepare(data_at(corpus, **changes), report=silent)


@pytest.mark.usefixtures("many_units")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_read_is_said_whoever_asks(corpus: Path, processes: int) -> None:
    (corpus / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": ""}\n{"text": ""}\n')
    (corpus / "a.pdf").write_text("%PDF")
    (corpus / "b.txt").touch()
    size = 1 + sum(file.stat().st_size for file in corpus.glob("[01]*.txt"))
    expected = (
        f"read 21 files: 21 documents, {size:,} bytes of text; skipped 3 without text (2 empty, 1 null)"
    )
    expected += "; left out 2 (1 .pdf, 1 empty)"
    lines: list[str] = []
    for _ in range(2):  # made, then found
        prepare(data_at(corpus), report=lines.append, processes=processes, verbose=True)
        assert lines.pop() == expected
    prepare(data_at(corpus), report=lines.append)
    assert len(lines) == 2, "a worker that finds the data says nothing"


def test_files_are_read_once_and_then_known_by_size_and_time(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = time.time() - 60
    for file in corpus.iterdir():
        os.utime(file, (old, old))
    prepared = prepare(data_at(corpus), report=silent)
    read: list[str] = []
    whole = fingerprints._read
    monkeypatch.setattr(
        fingerprints, "_read", lambda *asked: (read.append(Path(asked[0]).name), whole(*asked))[1]
    )
    assert prepare(data_at(corpus), report=silent) == prepared
    assert read == []
    (corpus / "03.txt").write_text((corpus / "03.txt").read_text()[::-1])
    (corpus / "05.txt").rename(corpus / "05b.txt")
    assert prepare(data_at(corpus), report=silent) != prepared
    assert sorted(read) == ["03.txt", "05b.txt"]
    prepare(data_at(corpus), report=silent)
    assert sorted(read) == ["03.txt", "03.txt", "05b.txt"], "03.txt was changed too lately to be trusted"


def test_a_cache_that_cannot_be_written_is_read(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = prepare(data_at(corpus), report=silent) / "tokenizer"
    prepared = [prepare(data_at(corpus), name, silent) for name in ("train", str(tokenizer))]
    real = os.open

    def read_only(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return io.open(file, mode, *rest, opener=read_only, **more)  # noqa: UP020

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: os.path.isdir(path) or read_only(path, os.O_CREAT))
    again = [prepare(data_at(corpus), name, silent) for name in ("train", str(tokenizer))]
    assert again == prepared
    with pytest.raises(
        UserError, match=r"--cache-dir .*: the data is not in it, and it cannot be written \(Read-only"
    ):
        prepare(data_at(corpus, vocab_size=280), report=silent)


@pytest.mark.usefixtures("many_units")
def test_without_file_locks_processes_prepare_beside_each_other(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lines: list[str] = []
    data = data_at(corpus, cache_dir=str(tmp_path / "shared"))
    with ThreadPoolExecutor(3) as threads:
        folders = {
            job.result() for job in [threads.submit(prepare, data, "train", lines.append) for _ in range(3)]
        }
    (folder,) = folders
    assert files_of(folder) == files_of(prepare(data_at(corpus), report=silent))
    assert [other.name for other in folder.parent.iterdir() if other.is_dir()] == [folder.name]
    assert any("the file system has no locks" in line for line in lines)


def test_many_token_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    count = 400
    made = [
        shards.write_shard(tmp_path, number, [(np.array([number, 7], np.uint16), 1, number)])
        for number in range(count)
    ]
    splits = shards.write_splits(tmp_path, made, np.zeros(count, bool))
    facts = {"vocab_size": 400, "dtype": "uint16", "prefix": [], "suffix": [7]}
    shards.write_index(tmp_path, made, splits, facts)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(300, allowed[1]), allowed[1]))
    try:
        stream = TokenStream(tmp_path, "train")
        ids, _ = stream.read(0, stream.tokens)
        assert np.array_equal(ids.reshape(count, 2)[:, 0], np.arange(count))
        assert stream.read(2, 3)[0] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


KILLED = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from corpora import Data
from shoal.data import pool, prepare, units
units.MIN_UNIT_BYTES = 3000
whole = pool.tokenize
def freeze_helpers():
    helpers = [int(pid) for pid in open(f"/proc/self/task/{{os.getpid()}}/children").read().split()]
    for helper in helpers:
        os.kill(helper, signal.SIGSTOP)
    print(*helpers, flush=True)
def tokenize(*arguments):
    for count, shard in enumerate(whole(*arguments)):
        if count == {count}:
            {before}os.kill(os.getpid(), signal.SIGKILL)
        yield shard
pool.tokenize = tokenize
prepare.prepare(Data(**json.loads(sys.argv[1])), processes=2)
"""


@pytest.mark.usefixtures("many_units")
@pytest.mark.parametrize("count", [0, 3])
def test_a_killed_preparation_goes_on_and_ends_in_the_same_files(
    corpus: Path, tmp_path: Path, count: int
) -> None:
    data = data_at(corpus, cache_dir=str(tmp_path / "killed"))
    program = KILLED.format(tests=str(Path(__file__).parent), count=count, before="")
    for _ in range(2):  # the second time it goes on from the first
        killed = subprocess.run([sys.executable, "-c", program, json.dumps(asdict(data))], env=with_shoal())
        assert killed.returncode == -signal.SIGKILL
        (journal,) = (tmp_path / "killed" / "corpora").glob("*.building/finished.jsonl")
        with journal.open("a") as file:
            file.write('{"number": 1, "docu')  # torn by the kill
        (journal.parent / "shard-00009.1.part").write_text("half a shard")
    written = [json.loads(line)["number"] for line in journal.read_text().splitlines() if line.endswith("}")]
    assert len(set(written)) == 2 * count
    finished = [journal.parent / f"shard-{number:05d}.bin" for number in written]
    times = [file.stat().st_mtime_ns for file in finished]
    resumed = prepare(data, report=silent)
    assert [(resumed / file.name).stat().st_mtime_ns for file in finished] == times
    whole = prepare(data_at(corpus, cache_dir=str(tmp_path / "whole")), report=silent)
    assert files_of(resumed) == files_of(whole)


@pytest.mark.usefixtures("many_units")
def test_helpers_that_outlive_a_killed_preparation_are_waited_for(corpus: Path, tmp_path: Path) -> None:
    data = data_at(corpus, cache_dir=str(tmp_path / "killed"))
    program = KILLED.format(tests=str(Path(__file__).parent), count=3, before="freeze_helpers(); ")
    killed = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(asdict(data))],
        env=with_shoal(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    frozen = [int(pid) for pid in killed.stdout.readline().split()]
    killed.wait()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            for pid in frozen:
                os.kill(pid, signal.SIGKILL)

    prepare(data, report=report)
    assert "waiting for another process" in lines[0]


@pytest.mark.usefixtures("many_units")
def test_processes_that_start_together_prepare_once(corpus: Path) -> None:
    program = "import json, sys; sys.path.insert(0, sys.argv[2]); from corpora import Data; "
    program += "from shoal.data.prepare import prepare; print(prepare(Data(**json.loads(sys.argv[1]))))"
    words = [sys.executable, "-c", program, json.dumps(asdict(data_at(corpus))), str(Path(__file__).parent)]
    started = [
        subprocess.Popen(words, env=with_shoal(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[0] for process in started]
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert "".join(said).count("prepared 20 documents") == 1


@pytest.mark.usefixtures("many_units")
def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes, real = [], os.fsync

    def full_after_eight(file: int) -> None:
        flushes.append(file)
        if len(flushes) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full_after_eight)
    with pytest.raises(UserError, match=r"--cache-dir .*: the disk is full; free some space"):
        prepare(data_at(corpus), report=silent, processes=1)
    monkeypatch.setattr(os, "fsync", real)
    lines: list[str] = []
    resumed = prepare(data_at(corpus), report=lines.append)
    assert re.match(r"[1-4] of ", lines[0])  # two flushes a shard, by as many threads as cores
    assert files_of(resumed) == files_of(
        prepare(data_at(corpus, cache_dir=str(tmp_path / "whole")), report=silent)
    )


def test_a_cache_that_cannot_be_made_is_one_clear_error(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"--cache-dir .*: it cannot be made \(Not a directory\)"):
        prepare(data_at(corpus, cache_dir=str(corpus / "01.txt" / "cache")), report=silent)


@pytest.mark.usefixtures("many_units")
def test_bad_input_found_by_a_process_of_the_pool_is_the_same_error(corpus: Path) -> None:
    (corpus / "07.txt").write_bytes(b"one\ntwo \xff\n")
    errors = []
    for processes in (1, 2):
        with pytest.raises(UserError) as caught:
            prepare(data_at(corpus), "train", silent, processes)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "07.txt line 2 is not UTF-8" in errors[0]


def test_a_process_of_the_pool_that_dies_is_an_error_not_a_hang(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "dies").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "dies"))
    job = units.Job([[], []], "text", "", False, [], [], "uint16")
    with pytest.raises(ShoalError, match="ended with code 3"):
        list(pool.tokenize(job, tmp_path, [0, 1], 2))


def test_documents_to_evaluate_on_may_be_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": f"held {i}"}) + "\n" for i in range(5)))
    folder = prepare(data_at(corpus, eval_path=[str(tmp_path / "held.jsonl")]), report=silent)
    assert documents_of(folder, "eval") == [f"held {i}" for i in range(5)]
    assert documents_of(folder, "train") == [file.read_text() for file in sorted(corpus.iterdir())]


def test_held_out_documents() -> None:
    hashes = np.array([content_hash(str(i).encode()) for i in range(10_000)])
    assert 150 < held_out(hashes, 0.02).sum() < 250
    assert held_out(hashes, 0.0).sum() == 0
    assert held_out(np.zeros(1, np.int64), 0.5).sum() == 0
    few = np.array([5, 3, 4]) << 40
    assert held_out(few, 1e-9).tolist() == [False, True, False]
    assert held_out(few, 0.99).tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00000.npy", "train.npy"])
def test_verify_names_the_damaged_file(corpus: Path, name: str) -> None:
    folder = prepare(data_at(corpus), report=silent)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ShoalError, match=name):
        TokenStream(folder, "train").verify()


def test_the_pool_imports_no_torch() -> None:
    program = "import sys, shoal.data.pool, shoal.data.prepare\n"
    program += "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], env=with_shoal(), capture_output=True, text=True)
    assert ran.stdout == "set()\n"


def with_shoal() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(helpers.PACKAGE_ROOT)}
