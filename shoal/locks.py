"""Locks on files: one process at a time, free again when it ends, however it ends."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # of file systems: NFS without lockd, some Lustre

Report = Callable[[str], None]


class NoLocks(Exception):
    """The file system cannot lock."""


def try_lock(file: IO[str]) -> bool:
    """Whether this process now holds the lock on an open file; it does until the file is closed. Raises NoLocks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _no_locks(error) from error
    return True


def wait_for_lock(file: IO[str]) -> None:
    """Lock an open file, after whoever holds it now. Raises NoLocks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise _no_locks(error) from error


@contextmanager
def locked(file: Path, waiting: str, report: Report) -> Iterator[bool]:
    """Hold the lock on `file`, which is made where it is missing; the value is whether it could be held.

    A process says `waiting` when it must wait for one of another run (the workers of one run have the same parent).
    Where the file system has no locks it goes on without, and says so. Raises OSError where no file can be made.
    """
    with _lock_file(file) as lock:
        held = _hold(lock, file, waiting, report)
        if held and lock.writable():
            lock.truncate(0)
            lock.write(str(os.getppid()))
            lock.flush()
        yield held


def _hold(lock: IO[str], file: Path, waiting: str, report: Report) -> bool:
    try:
        if not try_lock(lock):
            lock.seek(0)
            if lock.read() != str(os.getppid()):
                report(waiting)
            wait_for_lock(lock)
    except NoLocks as error:
        report(
            f"{file.parent} has no file locks ({error}): processes that start together may do the same work"
        )
        return False
    return True


def _lock_file(file: Path) -> IO[str]:
    try:
        lock = file.open("a+")
    except PermissionError:  # another user's; it can be locked all the same
        lock = file.open()
    os.set_inheritable(lock.fileno(), True)  # by helpers, which write on for a second after a kill
    return lock


def _no_locks(error: OSError) -> Exception:
    return NoLocks(error.strerror) if error.errno in NO_LOCKS else error
