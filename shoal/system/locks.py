"""A lock on a file, which ends with the process that holds it; and a clear answer where there are no locks."""

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO

# Of file systems: NFS without lockd, some Lustre.
NONE_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
POLL = 0.1

Report = Callable[[str], None]


class Answer(Enum):
    """The outcome of asking for a lock."""

    HELD = "this process holds it"
    BUSY = "another process holds it"
    NO_LOCKS = "the file system has no locks"


class Lock:
    """A lock on the file `path`, which is made where it is missing, and never removed.

    It lasts until `release`, or until this process has ended, however that happens. Child processes that inherit
    the file hold it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def take(self, patience: float = 0.0, *, inherited: bool = False) -> Answer:
        """Ask for the lock, again and again for `patience` seconds (inf: until it is free).

        With `inherited` processes that this one starts hold it too. Raises OSError where the file cannot be opened.
        """
        file = _opened(self.path)
        answer = _ask(file, fcntl.LOCK_EX, patience)
        if answer is Answer.BUSY:
            file.close()
        else:
            self._file = file
            os.set_inheritable(file.fileno(), inherited)
        return answer

    def is_busy(self) -> bool:
        """Whether another process holds it now. Changes nothing; False where that cannot be found out."""
        try:
            with self.path.open() as file:
                return _ask(file, fcntl.LOCK_SH, 0.0) is Answer.BUSY
        except OSError:
            return False

    def write(self, text: str) -> None:
        """Leave a note in the file, for processes that find it locked; not in another user's file."""
        assert self._file is not None
        if self._file.writable():
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()

    def note(self) -> str:
        """What its holder wrote; empty where it cannot be read."""
        try:
            return self.path.read_text(errors="replace")
        except OSError:
            return ""

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def locked(path: Path, waiting: str, report: Report) -> Iterator[bool]:
    """Wait for the lock on `path` and hold it; the value says whether the file system has locks.

    Helper processes that this one starts hold it too: they write on for a second after it was killed. `waiting` is
    reported where a process of another run holds it (the workers of one run have the same parent).
    """
    lock, parent = Lock(path), str(os.getppid())
    answer = lock.take(inherited=True)
    if answer is Answer.BUSY:
        if lock.note() != parent:
            report(waiting)
        answer = lock.take(math.inf, inherited=True)
    if answer is Answer.NO_LOCKS:
        report(f"{path.parent}: {answer.value}; processes that start together may do the same work")
    try:
        if answer is Answer.HELD:
            lock.write(parent)
        yield answer is Answer.HELD
    finally:
        lock.release()


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except PermissionError:  # another user's; it can be locked all the same
        return path.open()


def _ask(file: IO[str], kind: int, patience: float) -> Answer:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return Answer.HELD
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return Answer.BUSY
            time.sleep(POLL)
        except OSError as error:
            if error.errno not in NONE_HERE:
                raise
            return Answer.NO_LOCKS
