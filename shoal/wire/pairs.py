"""Messages between two processes alone, beside the collectives: how the two find each other, send and receive.

Everything here raises PeerLost when the other side is gone.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shoal.errors import PeerLost
from shoal.wire import meeting
from shoal.wire.lost import peer_lost
from shoal.wire.waits import WAITS

Work = dist.Work  # what was started on a pair: done after `Pair.finish`
MEET = timedelta(seconds=20)  # the longest wait at a door for a guest that has knocked


class Pair:
    """One end of a pair, `number` 0 or 1. One thread may use it.

    What one sends on a channel the other receives, in order. PeerLost, which also comes after `meeting.TIMEOUT`
    of silence, makes the pair unusable.
    """

    def __init__(self, store: dist.Store, name: str, number: int, patience: timedelta) -> None:
        """Meet the other, which gives the same `name`. Raises PeerLost when it has not come after `patience`."""
        with WAITS.on("a meeting of two"), peer_lost("a meeting of two"):
            self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore(name, store), number, 2, patience)
        self._other = 1 - number

    def start_send(self, tensor: Tensor, channel: int = 0) -> Work:
        """Begin to send `tensor`, which must stay as it is until `finish(work)`."""
        with peer_lost("send"):
            work: Work = self._group.send([tensor], self._other, channel)
            return work

    def finish(self, work: Work) -> None:
        """Wait until it has been sent, or received."""
        with WAITS.on("send or receive"), peer_lost("send or receive"):
            work.wait(meeting.TIMEOUT)

    def send(self, tensor: Tensor, channel: int = 0) -> None:
        """Send `tensor`."""
        self.finish(self.start_send(tensor, channel))

    def start_receive(self, tensor: Tensor, channel: int = 0) -> Work:
        """Begin to fill `tensor`, which is as large as the one that is sent; it is full after `finish(work)`."""
        with peer_lost("receive"):
            work: Work = self._group.recv([tensor], self._other, channel)
            return work

    def receive(self, tensor: Tensor, channel: int = 0) -> None:
        """Fill `tensor`."""
        self.finish(self.start_receive(tensor, channel))


@dataclass(frozen=True)
class Guest:
    """A process that has asked for a pair at a door."""

    number: int
    store: dist.Store
    key: str

    def meet(self) -> Pair:
        """The pair with it."""
        return Pair(self.store, self.key, 0, MEET)


class Door:
    """A name at which other processes can ask for a pair at any time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._store = meeting.own_store()
        self._count = 0

    def wait(self) -> Guest:
        """Wait, without a deadline, for the next guest."""
        self._count += 1
        key = f"{self.name}/{self._count}"
        with peer_lost("the next guest"):
            self._store.wait([key], meeting.FOREVER)
            return Guest(int(self._store.get(key)), meeting.own_store(), f"{key}/pair")


class Visitor:
    """A process that asks for pairs at the doors of others, as guest `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._store = meeting.own_store()

    def knock(self, door: str, patience: timedelta = meeting.TIMEOUT) -> Pair:
        """The pair with the process behind `door`. Raises PeerLost when it has not opened after `patience`."""
        with peer_lost(door):
            key = f"{door}/{self._store.add(f'{door}/count', 1)}"
            self._store.set(key, str(self.number))
        return Pair(self._store, f"{key}/pair", 1, patience)


class Bell:
    """A signal from one process to another through the store, which works during any exchange of theirs."""

    def __init__(self, name: str) -> None:
        self._key = f"bell/{name}"
        self._store = meeting.own_store()

    def ring(self) -> None:
        """Wake the process that waits, now or later. Does nothing once the store is gone."""
        with suppress(PeerLost), peer_lost("a bell"):
            self._store.set(self._key, "rung")

    def wait(self) -> None:
        """Return once it rings. Only one process may wait."""
        with peer_lost("a bell"):
            self._store.wait([self._key], meeting.FOREVER)
