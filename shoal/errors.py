"""What a user may see: one line that says what was asked, what was found, what to change."""

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
        super().__init__(f"{asked}: {found}; {change}")


class Preempted(ShoalError):
    """The run was asked to stop, saved its state, and can go on from there."""

    exit_code = PREEMPTED
