"""The wire: every exchange between ranks goes through here, is listed while it is open, and is counted.

Bytes are what the algorithm has a rank send (the payload of a ring or of direct exchanges), without the
headers of the transport. They count when an exchange begins: one that ends in a later step belongs to the step that
sent it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from shoal.wire import meeting
from shoal.wire.lost import peer_lost
from shoal.wire.waits import WAITS

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_texts: Counter[str] = Counter()  # by group, whose ranks all count alike


class Exchange:
    """An exchange that was started. Its tensors must not be touched before `wait`.

    Its start and `wait` raise PeerLost when the other side is gone, or silent for as long as `meeting.TIMEOUT`.
    `rank` is the other side in the wire's group; None: all of them.
    """

    def __init__(
        self, wire: "Wire", what: str, start: Callable[[], Iterable[dist.Work]], nbytes: int, rank: int | None
    ) -> None:
        self.what = what
        self.rank = rank
        self._ranks = wire.ranks if rank is None else (wire.ranks[rank],)
        self._wire = wire.counter
        self._wire.bytes_sent += nbytes  # that this rank sends
        with peer_lost(what, rank):
            self._works = list(start())
        self._wire.pending[self] = None

    def wait(self) -> None:
        """Wait until it is done, and count the seconds. A second call does nothing."""
        if self not in self._wire.pending:
            return
        started = time.perf_counter()
        try:
            with WAITS.on(self.what, self._ranks), peer_lost(self.what, self.rank):
                for work in self._works:
                    work.wait()
        finally:
            del self._wire.pending[self]
            self._wire.seconds_waited += time.perf_counter() - started

    def __str__(self) -> str:
        return self.what if self.rank is None else f"{self.what} with rank {self.rank}"


class Wire:
    """One rank's end of the exchanges over one axis of the mesh. `Mesh.wire` makes it."""

    def __init__(self, group: dist.ProcessGroup, counter: "Wire | None" = None) -> None:
        self.group = group
        self.counter = counter or self  # the wire whose counts and list the exchanges stand in
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))  # of the world
        self.pending: dict[Exchange, None] = {}  # those that are open, the oldest first
        self.bytes_sent = 0
        self.seconds_waited = 0.0

    def count(self, nbytes: int) -> None:
        """Add bytes that went to these ranks beside the wire: over pairs."""
        self.bytes_sent += nbytes

    def neighbours(self, size: int) -> "Wire":
        """A wire to the ranks in the same run of `size` ranks. This one counts for it. Every rank must call it."""
        first = self.rank // size * size
        return Wire(meeting.new_group(list(self.ranks[first : first + size])), self.counter)

    def start_all_reduce(self, tensor: Tensor, what: str = "all-reduce") -> Exchange:
        """Begin to sum `tensor` in place over the ranks."""
        return self._start(
            what,
            lambda: dist.all_reduce(tensor, group=self.group, async_op=True),
            2 * self._others_part(tensor),
        )

    def start_exchange(
        self, received: Tensor, counts: list[int], sent: Tensor, what: str = "all-to-all"
    ) -> Exchange:
        """Begin to send the r-th of `world_size` equal parts of `sent` to rank r.

        What rank q sends, `counts[q]` elements, lands in `received` in the order of the ranks.
        """
        parts = [sent.numel() // self.world_size] * self.world_size

        def start() -> dist.Work:
            return dist.all_to_all_single(received, sent, counts, parts, group=self.group, async_op=True)

        return self._start(what, start, self._others_part(sent))

    def start_all_gather(self, whole: Tensor, part: Tensor, what: str = "all-gather") -> Exchange:
        """Begin to fill `whole` [world_size * n] with every rank's `part` [n], in the order of the ranks."""
        nbytes = (self.world_size - 1) * part.nbytes
        return self._start(what, lambda: _all_gather(whole, part, group=self.group, async_op=True), nbytes)

    def start_reduce_scatter(self, part: Tensor, whole: Tensor, what: str = "reduce-scatter") -> Exchange:
        """Begin to fill `part` [n] with the sum over the ranks of this rank's part of `whole` [world_size * n]."""
        return self._start(
            what,
            lambda: _reduce_scatter(part, whole, group=self.group, async_op=True),
            self._others_part(whole),
        )

    def start_send(self, tensor: Tensor, rank: int, what: str = "send") -> Exchange:
        """Begin to send `tensor` to `rank`. It must not change before `wait`."""
        return self._start(
            what, lambda: dist.isend(tensor, group=self.group, group_dst=rank), tensor.nbytes, rank
        )

    def start_receive(self, tensor: Tensor, rank: int, what: str = "receive") -> Exchange:
        """Begin to overwrite `tensor` with what `rank` sends: of this size, in the order in which it was sent."""
        return self._start(what, lambda: dist.irecv(tensor, group=self.group, group_src=rank), 0, rank)

    def start_swap(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], rank: int, what: str = "swap"
    ) -> Exchange:
        """Begin to exchange tensors with `rank`, which calls this too. NCCL would hang on one after the other."""
        ways = ((dist.irecv, received), (dist.isend, sent))
        posted = [dist.P2POp(way, t, group=self.group, group_peer=rank) for way, ts in ways for t in ts]
        nbytes = sum(tensor.nbytes for tensor in sent)
        return Exchange(self, what, lambda: dist.batch_isend_irecv(posted), nbytes, rank)

    def sum(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """The sum of `tensor` over the ranks, in place, at once. For numbers, not for gradients."""
        self.start_all_reduce(tensor, what).wait()
        return tensor

    def broadcast(self, tensor: Tensor, what: str = "broadcast", *, counted: bool = True) -> None:
        """Overwrite `tensor` with the one of rank 0. Its bytes count unless `counted` is false."""
        nbytes = tensor.nbytes if counted and self.rank == 0 else 0
        start = lambda: dist.broadcast(tensor, group=self.group, group_src=0, async_op=True)  # noqa: E731
        self._start(what, start, nbytes).wait()

    def share_text(self, text: str) -> str:
        """The text that rank 0 gives, on every rank. Rank 0 may come as late as it likes.

        The other ranks poll the store: a collective would have a deadline. Raises PeerLost when the process that
        keeps the store is gone. (Torch's own way would unpickle.)
        """
        _texts[self.group.group_name] += 1
        key = f"text/{self.group.group_name}/{_texts[self.group.group_name]}"
        what = "rank 0's own work"
        with WAITS.on(what, self.ranks[:1]), peer_lost(what, 0):
            store = meeting.shared_store()
            if self.rank == 0:
                store.set(key, text)
                return text
            for _ in meeting.looks(lambda: store.check([key])):
                pass
            return str(store.get(key).decode())

    def wait_for_first(self) -> None:
        """Wait for rank 0, however long it has something to do alone."""
        self.share_text("")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._start("barrier", lambda: dist.barrier(self.group, async_op=True), 0).wait()

    def _start(
        self, what: str, start: Callable[[], dist.Work | None], nbytes: int, rank: int | None = None
    ) -> Exchange:
        def works() -> list[dist.Work]:
            work = start()
            assert work is not None, "only ranks of the group hold a wire"
            return [work]

        return Exchange(self, what, works, nbytes, rank)

    def _others_part(self, tensor: Tensor) -> int:
        return tensor.nbytes * (self.world_size - 1) // self.world_size
