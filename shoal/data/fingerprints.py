"""What is in the source files: SHA-256 of each, taken once and then known by the file's size, time and inode."""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from shoal.data.sources import Part
from shoal.data.stores import open_file, store_errors, tag_of
from shoal.system.locks import Report, locked

RECENT_NS = 2 * 10**9  # a file that was changed so lately could change again without a new time
BLOCK_BYTES = 1 << 20
WAITING = "waiting for another process that reads the same data"

Mark = list[int]  # size, time of the last change in ns, inode


def fingerprints(parts: Sequence[Part], cache: Path, report: Report) -> list[str]:
    """A name for the content of each part, equal for equal bytes: SHA-256, or the tag that an object store keeps.

    What was read is noted in `cache`, for the other workers and the next run. Where nothing can be noted, all is
    read again. Raises UserError for what cannot be read.
    """
    asked = {part.file: part.asked for part in parts}
    folder = cache / "fingerprints"
    digests = _noted(folder, asked)
    if len(digests) < len(asked):
        with ExitStack() as held:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder.with_suffix(".lock"), WAITING, report))
            digests |= _noted(folder, asked)  # by the process that held the lock before
            missing = {file: asked[file] for file in asked if file not in digests}
            marks = {file: _mark(file) for file in missing if _is_local(file)}
            digests |= {file: _read(file, flag) for file, flag in missing.items()}
            with suppress(OSError):
                _note(folder, {file: (mark, digests[file]) for file, mark in marks.items()})
    return [digests[part.file] + (f":{part.member}" if part.member else "") for part in parts]


def _read(file: str, asked: str) -> str:
    with store_errors(asked, file):
        if tag := tag_of(file):
            return f"etag:{tag}"
        digest = hashlib.sha256()
        with open_file(file) as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _noted(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """What the notes say of the files that are as they were then."""
    digests: dict[str, str] = {}
    for parent, names in _by_folder(file for file in files if _is_local(file)).items():
        notes = _notes_of(folder, parent)
        for file in names:
            mark, digest = notes.get(os.path.basename(file), (None, ""))
            if mark is not None and mark == _mark(file):
                digests[file] = digest
    return digests


def _note(folder: Path, read: dict[str, tuple[Mark | None, str]]) -> None:
    """Add to the notes what did not change meanwhile, and not shortly before."""
    for parent, files in _by_folder(read).items():
        notes = _notes_of(folder, parent)
        for file in files:
            mark, digest = read[file]
            if mark is not None and mark == _mark(file) and mark[1] < time.time_ns() - RECENT_NS:
                notes[os.path.basename(file)] = (mark, digest)
        target = _notes_file(folder, parent)
        aside = target.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(notes))
        aside.replace(target)


def _by_folder(files: Iterable[str]) -> dict[str, list[str]]:
    folders = defaultdict(list)
    for file in files:
        folders[os.path.dirname(os.path.abspath(file))].append(file)
    return folders


def _notes_of(folder: Path, parent: str) -> dict[str, tuple[Mark, str]]:
    try:
        notes = json.loads(_notes_file(folder, parent).read_bytes())
        return {name: (mark, digest) for name, (mark, digest) in notes.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged: then all is read again
        return {}


def _notes_file(folder: Path, parent: str) -> Path:
    """One file of notes for each folder of sources."""
    return folder / f"{hashlib.sha256(os.fsencode(parent)).hexdigest()[:32]}.json"


def _mark(file: str) -> Mark | None:
    try:
        status = os.stat(file)
    except OSError:  # it is refused when it is read
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _is_local(file: str) -> bool:
    return "://" not in file
