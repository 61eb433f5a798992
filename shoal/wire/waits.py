"""What this process waits for: for those who say so, and who end a process that waits in vain."""

import threading
import time
from dataclasses import dataclass
from types import TracebackType

LONG = 10.0  # seconds: a wait that lasts so long is said, and is no part of the speed


@dataclass(frozen=True)
class Wait:
    """A wait for `ranks` of the world, of whom it is not known which; empty: any of the others."""

    what: str
    ranks: tuple[int, ...]
    since: float

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.since


class Waits:
    """The waits of the thread that trains, the innermost last. Those of its helpers are no wait of the run."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """From now on the waits of this thread count."""
        self.step = 0  # the step in hand, counted from 1; 0 before the first
        self.stalled = 0.0  # seconds of long waits that are over
        self._thread = threading.get_ident()
        self._open: list[Wait] = []

    @property
    def current(self) -> Wait | None:
        """What is waited for now."""
        return next(iter(self._open), None)  # the outermost, which began first

    def on(self, what: str, ranks: tuple[int, ...] = ()) -> "_Waiting":
        """Within the block this thread waits for `ranks`."""
        return _Waiting(self, what, ranks)


class _Waiting:
    def __init__(self, waits: Waits, what: str, ranks: tuple[int, ...]) -> None:
        self._waits, self._what, self._ranks = waits, what, ranks

    def __enter__(self) -> None:
        self._counts = self._waits._thread == threading.get_ident()
        if self._counts:
            self._waits._open.append(Wait(self._what, self._ranks, time.monotonic()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._counts:
            return
        wait = self._waits._open.pop()
        if not self._waits._open and wait.seconds > LONG:
            self._waits.stalled += wait.seconds


WAITS = Waits()  # of this process
