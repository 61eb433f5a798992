"""The wire: every exchange between replicas goes through here, and every byte of it is counted.

Bytes are what the algorithm has a rank send (the payload of a ring or of direct exchanges), without the
headers of the transport.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from shoal.wire import mesh

Work = dist.Work  # a started exchange: done after its `.wait()`
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


_texts: Counter[str] = Counter()  # by group, whose ranks all count alike


class Wire:
    """One rank's end of the exchanges over one axis of the mesh."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_sent = 0

    def neighbours(self, size: int) -> "Wire":
        """A wire to the ranks that stand in the same run of `size` ranks; it counts for itself."""
        return Wire(mesh.neighbours(self.group, size))

    def start_all_reduce(self, tensor: Tensor) -> Work:
        """Begin to sum `tensor` in place over the ranks; the result is there after `.wait()`."""
        self.bytes_sent += 2 * self._others_part(tensor)
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def start_exchange(self, received: Tensor, counts: list[int], sent: Tensor) -> Work:
        """Begin to send the r-th of `world_size` equal parts of `sent` to rank r.

        What rank q sends, `counts[q]` elements, lands in `received` in the order of the ranks.
        """
        self.bytes_sent += self._others_part(sent)
        parts = [sent.numel() // self.world_size] * self.world_size
        return dist.all_to_all_single(received, sent, counts, parts, group=self.group, async_op=True)

    def start_all_gather(self, whole: Tensor, part: Tensor) -> Work:
        """Begin to fill `whole` [world_size * n] with every rank's `part` [n], in the order of the ranks."""
        self.bytes_sent += (self.world_size - 1) * part.nbytes
        return _all_gather(whole, part, group=self.group, async_op=True)

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Work:
        """Begin to fill `part` [n] with the sum over the ranks of this rank's part of `whole` [world_size * n]."""
        self.bytes_sent += self._others_part(whole)
        return _reduce_scatter(part, whole, group=self.group, async_op=True)

    def start_send(self, tensor: Tensor, rank: int) -> Work:
        """Begin to send `tensor` to `rank`. It must not change before `.wait()`."""
        self.bytes_sent += tensor.nbytes
        return _started(dist.isend(tensor, group=self.group, group_dst=rank))

    def start_receive(self, tensor: Tensor, rank: int) -> Work:
        """Begin to overwrite `tensor` with what `rank` sends: of this size, in the order in which it was sent."""
        return _started(dist.irecv(tensor, group=self.group, group_src=rank))

    def start_swap(self, sent: list[Tensor], received: list[Tensor], rank: int) -> list[Work]:
        """Begin to exchange tensors with `rank`, which calls this too. All at once: NCCL runs one after the other."""
        self.bytes_sent += sum(tensor.nbytes for tensor in sent)
        ways = ((dist.irecv, received), (dist.isend, sent))
        posted = [
            dist.P2POp(way, t, group=self.group, group_peer=rank) for way, tensors in ways for t in tensors
        ]
        return dist.batch_isend_irecv(posted)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, in place, at once. For numbers, not for gradients."""
        self.start_all_reduce(tensor).wait()
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the one of rank 0."""
        self.bytes_sent += tensor.nbytes if self.rank == 0 else 0
        dist.broadcast(tensor, group=self.group, group_src=0)

    def share_text(self, text: str) -> str:
        """The text that rank 0 gives, on every rank. Rank 0 may come as late as it likes.

        The other ranks poll the store: a collective would have a deadline. Raises ConnectionError when the process
        that keeps the store is gone. (Torch's own way would unpickle.)
        """
        _texts[self.group.group_name] += 1
        key = f"text/{self.group.group_name}/{_texts[self.group.group_name]}"
        with _as_connection_error():
            store = mesh.shared_store()
            if self.rank == 0:
                store.set(key, text)
                return text
            for _ in mesh.looks(lambda: store.check([key])):
                pass
            return str(store.get(key).decode())

    def wait_for_first(self) -> None:
        """Wait for rank 0, however long it has something to do alone."""
        self.share_text("")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(self.group)

    def _others_part(self, tensor: Tensor) -> int:
        return tensor.nbytes * (self.world_size - 1) // self.world_size


def _started(work: Work | None) -> Work:
    assert work is not None, "only ranks of the group hold a wire"
    return work


FOREVER = timedelta(days=365)
MEET = timedelta(seconds=20)  # how long who opens a door waits for the guest that has knocked


class Pair:
    """Two processes that talk to each other alone, beside the collectives of all: for one thread at each end.

    What one sends on a channel the other receives, in order. Raises ConnectionError when the other is gone, or silent
    for as long as a collective may take; the pair is of no use then.
    """

    def __init__(self, group: dist.ProcessGroup, number: int) -> None:
        self._group = group
        self._other = 1 - number

    def start_send(self, tensor: Tensor, channel: int = 0) -> Work:
        """Begin to send `tensor`, which must stay as it is until `finish(work)`."""
        with _as_connection_error():
            return self._group.send([tensor], self._other, channel)

    def finish(self, work: Work) -> None:
        """Wait until it has been sent, or received."""
        with _as_connection_error():
            work.wait(mesh.TIMEOUT)

    def send(self, tensor: Tensor, channel: int = 0) -> None:
        """Send `tensor`."""
        self.finish(self.start_send(tensor, channel))

    def start_receive(self, tensor: Tensor, channel: int = 0) -> Work:
        """Begin to fill `tensor`, which is as large as the one that is sent; it is full after `finish(work)`."""
        with _as_connection_error():
            return self._group.recv([tensor], self._other, channel)

    def receive(self, tensor: Tensor, channel: int = 0) -> None:
        """Fill `tensor`."""
        self.finish(self.start_receive(tensor, channel))


@dataclass(frozen=True)
class Guest:
    """Another process that has come to a door."""

    number: int
    store: dist.Store
    key: str

    def meet(self) -> Pair:
        """The pair with it. Raises ConnectionError when it does not come in."""
        with _as_connection_error():
            return Pair(mesh.pair(self.store, self.key, 0, MEET), 0)


class Door:
    """Where other processes may come at any time to be talked to alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._store = mesh.own_store()
        self._count = 0

    def wait(self) -> Guest:
        """The next guest, whenever it comes. Raises ConnectionError when nobody can come any more."""
        self._count += 1
        key = f"{self.name}/{self._count}"
        with _as_connection_error():
            self._store.wait([key], FOREVER)
            return Guest(int(self._store.get(key)), mesh.own_store(), f"{key}/pair")


class Visitor:
    """One process that comes to the doors of others, as guest `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._store = mesh.own_store()

    def knock(self, door: str, patience: timedelta = mesh.TIMEOUT) -> Pair:
        """The pair with whoever opens. Raises ConnectionError when nobody does for so long."""
        with _as_connection_error():
            key = f"{door}/{self._store.add(f'{door}/count', 1)}"
            self._store.set(key, str(self.number))
            return Pair(mesh.pair(self._store, f"{key}/pair", 1, patience), 1)


class Bell:
    """A signal from one process to another, through the store: whatever exchanges either of them is in."""

    def __init__(self, name: str) -> None:
        self._key = f"bell/{name}"
        self._store = mesh.own_store()

    def ring(self) -> None:
        """Wake the process that waits, now or later. Does nothing once the store is gone."""
        with suppress(ConnectionError), _as_connection_error():
            self._store.set(self._key, "rung")

    def wait(self) -> None:
        """Return once it is rung. One process may wait. Raises ConnectionError once the store is gone."""
        with _as_connection_error():
            self._store.wait([self._key], FOREVER)


@contextmanager
def _as_connection_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = said.partition("] ")[2] if said.startswith("[") else said  # where in gloo's source
        raise ConnectionError(said.split(". ")[0]) from error
