"""What a user may see: one line that says what was asked, what was found, what to change."""

import errno
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

Entry = TypeVar("Entry")

DONE = 0
FAILED = 1
BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL: saved, please start the same command again
INTERRUPTED = 130

LONGEST = 2000  # characters of a message; of a longer one the middle is left out
QUOTED = 200  # characters of a value
LESS_MEMORY = "lower --per-device-train-batch-size or --sequence-length (of shoal generate: --batch-size)"
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
DENIED = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "name a shorter one",
}
# In the messages of libraries that have no exception type for it: torch, CUDA's, C++, safetensors.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc")
NO_SPACE = ("No space left on device", "Disk quota exceeded")


class ShoalError(Exception):
    """Base of the errors that are printed as one line, without a traceback."""

    exit_code = FAILED
    of_all = False  # whether every worker has it, so that one of each machine says it

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UserError(ShoalError):
    """Bad input: what was asked, what was found (with file and line where there is one), what to change."""

    exit_code = BAD_INPUT

    def __init__(self, asked: str, found: str, change: str) -> None:
        self.asked, self.found, self.change = asked, found, change
        super().__init__(f"{asked}: {found}; {change}")


class NoRoom(ShoalError):
    """A disk is full. The user can mend that, and the run goes on from its last checkpoint."""

    exit_code = BAD_INPUT


class PeerLost(ConnectionError):
    """The other side of the exchange `what` is gone or silent. `rank` is None where all ranks take part.

    `who` names the rank in words, once it is known which one is gone.
    """

    def __init__(self, rank: int | None, what: str, how: str, who: str = "") -> None:
        self.rank, self.what, self.how, self.who = rank, what, how, who
        partner = f" with {who}" if who else "" if rank is None else f" with rank {rank}"
        super().__init__(f"{what}{partner}: {how}")

    @property
    def is_silent(self) -> bool:
        """Whether the other side may still be there: it did not answer in time."""
        return "timed out" in self.how.lower()


class Preempted(ShoalError):
    """The run was asked to stop, saved its state, and can go on from there."""

    exit_code = PREEMPTED
    of_all = True


class WorkerLost(ShoalError):
    """Another worker is gone, and this one cannot go on without it."""

    of_all = True


def printable(text: str) -> str:
    """The text with what would move a cursor, break a line or be half a character written as an escape."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def choose(flag: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` that `flag` names. Raises UserError with the names there are."""
    if name not in table:
        raise UserError(f"{flag} {name}", "there is none of that name", f"take one of: {', '.join(table)}")
    return table[name]


def one_line(text: str) -> str:
    """`text` on one line: line ends become spaces, characters that would not show become escapes such as `\\x1b`."""
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    shown = printable(joined)
    half = LONGEST // 2
    return shown if len(shown) <= LONGEST else f"{shown[:half]} ... {shown[-half:]}"


def quoted(value: object) -> str:
    """A value as Python writes it, its beginning if that is long."""
    try:
        text = repr(value)
    except ValueError:  # it holds an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]} ..."


def described(error: BaseException) -> str:
    """The first line of an error, and of the one that it came of, which may be what matters."""
    *_, first = _chain(error)
    return first_line(error) if first is error else f"{first_line(error)} (after {first_line(first)})"


def foreseen(error: BaseException, folder: str = "", kept: str = "") -> ShoalError | None:
    """An error as one line: a ShoalError, or a lack of memory, disk or permission; None if it needs its traceback.

    `folder` is where this process writes, for errors that do not say where; `kept` says what it has saved there.
    """
    if isinstance(error, ShoalError):
        return error
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        said = first_line(each)
        if isinstance(each, MemoryError) or number == errno.ENOMEM or any(sign in said for sign in NO_MEMORY):
            return ShoalError(f"memory ran out ({said}); {LESS_MEMORY}, or free some")
        if number in FULL or any(sign in said for sign in NO_SPACE):
            found = FULL.get(number or 0, FULL[errno.ENOSPC])
            change = f"free some space{'; ' if kept else ''}{kept}"
            return NoRoom(f"{place_of(each) or folder}: {found}; {change}")
    if isinstance(error, OSError) and error.errno in DENIED and (place_of(error) or folder):
        return ShoalError(f"{place_of(error) or folder}: {error.strerror}; {DENIED[error.errno]}")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return ShoalError(f"{error.strerror}; raise the limit, as in: ulimit -n 65536")
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, as the errors of an open file do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on to the first."""

    def all_of_it() -> Iterator[BaseException]:
        each: BaseException | None = error
        while each is not None:
            yield each
            each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)

    return islice(all_of_it(), 100)  # one may be its own cause


def first_line(error: BaseException) -> str:
    """`RuntimeError: its first line that is not empty`, else where it was raised."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if said:
        return f"{type(error).__name__}: {said}"
    frames = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + (f" in {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def place_of(error: BaseException) -> str:
    """The file that an OSError is about, if it says so."""
    name = getattr(error, "filename", None)
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""
