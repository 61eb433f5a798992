"""What a user may see: one line that says what was asked, what was found, what to change."""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")

DONE = 0
FAILED = 1
BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL: saved, please start the same command again
INTERRUPTED = 130


class ShoalError(Exception):
    """Base of the errors that are printed as one line, without a traceback."""

    exit_code = FAILED


class UserError(ShoalError):
    """Bad input: what was asked, what was found (with file and line where there is one), what to change."""

    exit_code = BAD_INPUT

    def __init__(self, asked: str, found: str, change: str) -> None:
        self.asked, self.found, self.change = asked, found, change
        super().__init__(printable(f"{asked}: {found}; {change}"))


class Preempted(ShoalError):
    """The run was asked to stop, saved its state, and can go on from there."""

    exit_code = PREEMPTED


def printable(text: str) -> str:
    """The text with what would move a cursor, break a line or be half a character written as an escape."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def choose(flag: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` that `flag` names. Raises UserError with the names there are."""
    if name not in table:
        raise UserError(f"{flag} {name}", "there is none of that name", f"take one of: {', '.join(table)}")
    return table[name]
