"""What a process prints. It never decides over what is computed; but what was asked for arrives, or is an error."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

from shoal.errors import DONE, ShoalError


class NobodyReads(ShoalError):
    """Whoever read what was asked for, `head` for one, has seen enough: a quiet way out, and no fault."""

    exit_code = DONE


class _Forgiving(io.FileIO):
    """A descriptor to print to. Once it cannot be written it is /dev/null, for C libraries and children too."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody shares it who has set it not to wait
                select.select((), (self.fileno(),), ())
            return written
        except OSError as error:
            self.lost = error
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def forgive() -> None:
    """Have stdout and stderr of this process take whatever is printed, from the first thing it does on.

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
    """Why stdout could not be written, if that is so."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Forgiving) else None


def result(text: str, end: str = "\n") -> None:
    """Print what was asked for. Raises NobodyReads where the reader is gone, ShoalError where it does not fit."""
    try:
        print(text, end=end, flush=True)
        if (error := lost()) is not None:
            raise error
    except BrokenPipeError:
        raise NobodyReads("nobody reads stdout any more") from None
    except OSError as error:
        raise ShoalError(
            f"stdout: {error.strerror}; what was asked for could not be written, direct it elsewhere"
        ) from None


def say(text: str) -> None:
    """Print a line on stderr, where it does not mix with results; nothing where that cannot be."""
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
