"""Handlers of the signals that ask a run to end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from shoal.errors import Preempted, ShoalError

LOOK = 0.2  # seconds between two looks whether a worker that was asked to stop waits in vain
OWN_WAY = 2.0  # seconds that Ctrl-C has to end the worker as Python does it

NOTHING_TO_SAVE = "stopped with nothing to save yet"

Receive = Callable[[int, FrameType | None], Any] | int  # a function, or SIG_DFL or SIG_IGN


def hear(number: signal.Signals, receive: Receive) -> Receive | None:
    """Handle the signal by `receive` from now on; returns the handler before.

    In a thread other than the main one, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return signal.getsignal(number)
    return signal.signal(number, receive)


@contextmanager
def heard(receive: Receive, *numbers: signal.Signals) -> Iterator[None]:
    """Handle these signals by `receive` within the block, then restore the handlers before, unless replaced since."""
    previous = {number: hear(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            if signal.getsignal(number) == receive and before is not None:
                hear(number, before)


class Stop:
    """SIGTERM: before training it ends the worker at once, in whatever call; after `hold` it only sets a flag.

    Python runs a handler once the main thread comes back from the call that it is in, and one that waits for another
    rank may never come back. So a thread hears the signals too, where `leave` is given. It ends a worker that has
    nothing to save, and one that waits for a rank which is silent; Ctrl-C ends a worker that does not end of itself.
    """

    def __init__(self, leave: Callable[[ShoalError | KeyboardInterrupt], object] | None = None) -> None:
        """`leave` ends this process with the error that it is given."""
        self.asked = False
        self._tell: Callable[[], None] | None = None
        self._stuck: Callable[[], str] = str
        self._leave = leave
        self._ending = threading.Lock()
        if leave is not None and threading.current_thread() is threading.main_thread():
            hear(signal.SIGTERM, self._receive)
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self._hear, args=(read,), name="signals", daemon=True).start()

    def hold(self, tell: Callable[[], None], stuck: Callable[[], str] = str) -> None:
        """From now on there is something to save.

        `tell` is called at SIGTERM; `stuck` returns, in words, for which silent rank this one waits, if it does.
        """
        self._stuck, self._tell = stuck, tell
        hear(signal.SIGTERM, self._receive)

    def __call__(self) -> bool:
        """Whether the run was asked to stop."""
        return self.asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._tell is None:
            self.end(Preempted(NOTHING_TO_SAVE))
        else:
            self._tell()

    def _hear(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM:
                self._end_where_nothing_is_lost()
            if number[0] == signal.SIGINT:
                time.sleep(OWN_WAY)
                self.end(KeyboardInterrupt())

    def _end_where_nothing_is_lost(self) -> None:
        if self._tell is None:
            self.end(Preempted(NOTHING_TO_SAVE))
        while not (awaited := self._stuck()):
            time.sleep(LOOK)
        change = "go on with --resume-from-checkpoint latest"
        self.end(Preempted(f"stopped while waiting for {awaited}, without saving; {change}"))

    def end(self, error: ShoalError | KeyboardInterrupt) -> None:
        """End the process by `leave`, once, if that was given: several threads may come to it at the same time."""
        if self._leave is None:
            return
        if self._ending.acquire(blocking=False):
            self._leave(error)
        time.sleep(OWN_WAY)


def nothing_to_save(number: int, frame: FrameType | None) -> None:
    """What SIGTERM means before there are workers. Raises Preempted."""
    raise Preempted(NOTHING_TO_SAVE)
