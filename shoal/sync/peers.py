"""Messages sent directly from one replica to another: a rank that dies takes no other exchange down with it.

What gloo can notice is a process that ended: its connections close, and whatever is exchanged with it fails at once.
A machine that hangs or is cut off closes nothing. It is missed after the group's timeout only, and that is an error
for all: gloo then fails every exchange of the group, with whomever.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.wire.wire import Exchange, Wire

Message = tuple[int, Tensor]  # the other rank, and what is sent to it or received from it
Posted = list[tuple[int, Exchange]]
Result = TypeVar("Result")


class Peers:
    """The other ranks, as far as they answer. Tensors travel over gloo, so they lie in the memory of the CPU."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.alive = [rank for rank in range(wire.world_size) if rank != wire.rank]

    def start(self, sent: Iterable[Message], received: Iterable[Message]) -> Posted:
        """Begin to send and to receive; messages between two ranks arrive in the order given here."""
        receipts = [
            (peer, self._try(peer, self.wire.start_receive, tensor, peer)) for peer, tensor in received
        ]
        sendings = [(peer, self._try(peer, self.wire.start_send, tensor, peer)) for peer, tensor in sent]
        return [(peer, exchange) for peer, exchange in receipts + sendings if exchange is not None]

    def wait(self, posted: Posted) -> None:
        """Until all of it is done. What came from a rank that is not among `alive` afterwards is void."""
        for peer, exchange in posted:
            self._try(peer, exchange.wait)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every rank that answers, this one's included, in the order of the ranks.

        Each pair exchanges directly: every rank itself notices a dead one, and none waits for another that waits for
        the dead. It sends (N - 1) times the tensor, where a ring would send it less than twice.
        """
        found = {peer: torch.empty_like(tensor) for peer in self.alive}
        self.wait(self.start([(peer, tensor) for peer in self.alive], list(found.items())))
        found = {peer: found[peer] for peer in self.alive} | {self.wire.rank: tensor}
        return [found[rank] for rank in sorted(found)]

    def _try(self, peer: int, act: Callable[..., Result], *args: Any) -> Result | None:
        if peer not in self.alive:
            return None
        try:
            return act(*args)
        except PeerLost as error:
            if error.is_silent:
                raise
            self.alive.remove(peer)
            if self.wire.rank < min(self.alive, default=self.wire.world_size):  # one of them tells it
                said = f"shoal: worker {peer} no longer answers: {len(self.alive) + 1} go on without it"
                print(said, file=sys.stderr, flush=True)
            return None
