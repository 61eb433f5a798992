"""Messages sent directly from one replica to another, so that a rank that dies fails no other exchange.

Gloo notices a process that ended: its connections close, and every exchange with it fails at once. A machine that
hangs or is cut off closes nothing. Only the group's timeout detects it, and that is an error for all: gloo then fails
every exchange of the group.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.sync.members import Members, say
from shoal.wire.wire import Exchange, Wire

Message = tuple[int, Tensor]  # the other rank, and what is sent to it or received from it
Posted = list[tuple[int, Exchange]]
Result = TypeVar("Result")


class Peers(Members):
    """The other ranks, as long as they answer. Tensors are sent over gloo, so they must be in the CPU's memory."""

    all_agree = False  # once a rank is gone

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self.alive = [rank for rank in range(wire.world_size) if rank != wire.rank]

    def start(self, sent: Iterable[Message], received: Iterable[Message]) -> Posted:
        """Begin to send and to receive; messages between two ranks arrive in the order given here."""
        receipts = [
            (peer, self._try(peer, self.wire.start_receive, tensor, peer)) for peer, tensor in received
        ]
        sendings = [(peer, self._try(peer, self.wire.start_send, tensor, peer)) for peer, tensor in sent]
        return [(peer, exchange) for peer, exchange in receipts + sendings if exchange is not None]

    def wait(self, posted: Posted) -> None:
        """Wait until all of it is done. What came from a rank that is not among `alive` afterwards is void."""
        for peer, exchange in posted:
            self._try(peer, exchange.wait)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every rank that answers, this one's included, in the order of the ranks.

        Each pair exchanges directly, so that every rank itself notices a dead one, and none waits for a rank that
        waits for the dead one. It sends the tensor N - 1 times, where a ring would send it less than twice.
        """
        found = {peer: torch.empty_like(tensor) for peer in self.alive}
        self.wait(self.start([(peer, tensor) for peer in self.alive], list(found.items())))
        found = {peer: found[peer] for peer in self.alive} | {self.wire.rank: tensor}
        return [found[rank] for rank in sorted(found)]

    @property
    def present(self) -> list[int]:
        return [*self.alive, self.wire.rank]

    def _sum(self, numbers: Tensor) -> Tensor:
        # Each pair on its own, so that a dead rank is noticed within the step.
        return torch.stack(self.gather(numbers)).sum(0)

    def _try(self, peer: int, act: Callable[..., Result], *args: Any) -> Result | None:
        if peer not in self.alive:
            return None
        try:
            return act(*args)
        except PeerLost as error:
            if error.is_silent:
                raise
            self.alive.remove(peer)
            if self.wire.rank < min(self.alive, default=self.wire.world_size):  # only one of them says it
                say(f"shoal: worker {peer} no longer answers: {len(self.alive) + 1} go on without it")
            return None
