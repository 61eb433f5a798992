"""Printing. A line that cannot be printed never ends a run; a result that cannot be printed is an error."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

from shoal.errors import DONE, ShoalError


class NobodyReads(ShoalError):
    """The reader of a result, such as `head`, has closed the pipe: the process ends quietly, and without an error."""

    exit_code = DONE


class _Forgiving(io.FileIO):
    """A descriptor to print to. Once it cannot be written it is /dev/null, for C libraries and children too."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another process made it non-blocking
                select.select((), (self.fileno(),), ())
            return written
        except OSError as error:
            self.lost = error
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def forgive() -> None:
    """Let printing to stdout and stderr never fail in this process from now on.

    What their encoding lacks is written as `\\u4eca`; what cannot be written goes nowhere.
    """
    occupy()
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def occupy() -> None:
    """Open stdin, stdout and stderr as /dev/null where they are closed: else the next file would take their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number that is free


def lost() -> OSError | None:
    """The error by which stdout was lost, if it was."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Forgiving) else None


def result(text: str, end: str = "\n") -> None:
    """Print a result. Raises NobodyReads where the reader is gone, ShoalError where it cannot be written."""
    try:
        print(text, end=end, flush=True)
        if (error := lost()) is not None:
            raise error
    except BrokenPipeError:
        raise NobodyReads("nobody reads stdout any more") from None
    except OSError as error:
        raise ShoalError(
            f"stdout: {error.strerror}; the result could not be written; redirect it elsewhere"
        ) from None


def say(text: str) -> None:
    """Print a line on stderr, where it does not mix with results. If that fails, nothing happens."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


def _stream(number: int, given: Any) -> io.TextIOWrapper:
    if given is not None:
        with suppress(OSError, ValueError):
            given.flush()
    raw = _Forgiving(number, "w", closefd=False)
    encoding = getattr(given, "encoding", None) or "utf-8"
    by_line = number == 2 or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=by_line
    )
