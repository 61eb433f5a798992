"""Handlers of the signals that ask a run to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from shoal.errors import Preempted

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


def nothing_to_save(number: int, frame: FrameType | None) -> None:
    """What SIGTERM means before there are workers. Raises Preempted."""
    raise Preempted(NOTHING_TO_SAVE)
