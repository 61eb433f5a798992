"""The cache of prepared data: what is there is found without a lock, what is missing is made by one process."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import DENIED, FULL, UserError, place_of
from shoal.system.locks import Report, locked

WAITING = "waiting for another process that prepares the same data"


def folder_of(cache_dir: str) -> Path:
    """The folder that `--cache-dir` names. Raises UserError where it is below the home of a user without one."""
    try:
        return Path(cache_dir or "~/.cache/shoal").expanduser()
    except RuntimeError:
        asked = f"--cache-dir {cache_dir}".strip()
        raise UserError(asked, "this user has no home folder", "give a folder, or set HOME") from None


def made(target: Path, make: Callable[[Path], None], report: Report) -> bool:
    """Whether this process made the folder `target`: `make` fills a folder beside it, which is then moved there.

    The folder beside has a fixed name, so that the next process goes on with the work of a killed one. Without locks,
    where several may work at once, each has its own. Raises OSError where nothing can be written.
    """
    if target.is_dir():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock"), WAITING, report) as held:
        if target.is_dir():
            return False
        own = "" if held else f".{os.getpid()}-{time.time_ns()}"
        beside = target.with_suffix(f"{own}.building")
        make(beside)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(beside)  # another was first
            return False
    return True


@contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """One line for a cache that is full or cannot be written."""
    asked, change = f"--cache-dir {cache}", "name a folder on a disk that can be written"
    try:
        yield
    except OSError as error:
        if full := FULL.get(error.errno or 0):
            raise UserError(asked, full, "free some space, or name another") from error
        if not cache.is_dir():
            raise UserError(asked, f"it cannot be made ({error.strerror})", change) from error
        if error.errno in DENIED and Path(place_of(error) or cache).is_relative_to(cache):
            found = f"the data is not in it, and it cannot be written ({error.strerror})"
            raise UserError(asked, found, change) from error
        raise
