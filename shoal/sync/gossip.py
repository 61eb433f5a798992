"""Gossip: each replica updates alone and averages its parameters with one or two neighbours, never with all.

x_i are the parameters of replica i, g_i the gradient of its own micro-batches times N, so that the mean of all g_i is
the gradient of the step; Opt is the inner optimizer (any), W_k the mixing matrix of step k.

| topology | neighbours | W | a step sends |
|---|---|---|---|
| `ring` | both sides | 1/3 each (two ranks: 1/2) | 2P |
| `exponential` | rank i sends to i + 2^(k mod log2 N) | 1/2 each | P |
| `push-sum` | the same, and the weights w_i travel along | 1/2 each | P + 8 bytes |

`ring`, `exponential`: x_i = sum_j W_ij x_j, then Opt(x_i, g_i(old x_i)). This is D-PSGD (Lian et al. 2017,
arXiv 1705.09056, algorithm 1, from memory), whose average needs only what was known before the gradient: it travels
during the forward and backward pass. The one-peer graph is that of Ying et al. 2021 (arXiv 2110.13363): log2 N steps
average exactly where N is a power of two.

`push-sum` is SGP (Assran et al. 2019, arXiv 1811.10792): the replica holds z_i = x_i / w_i, w_i = 1 at first;
x_i = sum_j W_ij x_j, w_i = sum_j W_ij w_j, then Opt(x_i, g_i(old z_i)). Columns of W add up to one, rows need not:
z_i still goes to the mean, where a plain average drifts towards the replicas that are received most. While all
ranks are there w_i stays 1; its 8 bytes are of use when a rank has died. The order is that of the authors' code with
`overlap=True`, which also lets the optimizer step x and not z, over the same graph.

With `overlap_steps` 0 the replicas update first and mix afterwards (adapt-then-combine: SGP as printed in the paper).
Communication then does not overlap computation, but two ranks follow all-reduce exactly if the optimizer is linear.

With a codec differences are sent, and a replica moves by the part `mixing` to the average: see `shoal.sync.copies`.

Held: a copy of the parameters to send and one for each neighbour received. Staleness 0: the averaged parameters are
of one step. Use it where links are slow and ranks are many: the bytes of a step do not depend on N, but for the few
numbers that tell all ranks the loss. For few ranks all-reduce sends hardly more (of 4: 1.5 P), and is exact. Each
rank keeps its own buffers of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.codecs import Subject
from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.errors import choose
from shoal.replica import Replica, Step
from shoal.sync.base import Guardable, State, Sync
from shoal.sync.copies import Copies, default_mixing, payload_bytes
from shoal.sync.parameters import read, write
from shoal.sync.peers import Peers, Posted
from shoal.tensors.buckets import Bucket
from shoal.wire.wire import Wire

DEFAULT_TOPOLOGY = "exponential"  # half the bytes of the ring, and it averages faster


def ring(rank: int, world_size: int, step: int) -> list[int]:
    """The ranks that `rank` sends to: those on both sides, once each."""
    return sorted({(rank - 1) % world_size, (rank + 1) % world_size} - {rank})


def exponential(rank: int, world_size: int, step: int) -> list[int]:
    """The ranks that `rank` sends to: one, 1, 2, 4, ... ahead in turn."""
    hops = (world_size - 1).bit_length()
    return [(rank + 2 ** (step % hops)) % world_size] if hops else []


TOPOLOGIES: dict[str, Callable[[int, int, int], list[int]]] = {
    "ring": ring,
    "exponential": exponential,
    "push-sum": exponential,
}


def mixing_matrix(topology: str, world_size: int, step: int) -> Tensor:
    """W [N, N] in float64: the part of replica j (column) that goes to replica i (row). Columns add up to one."""
    matrix = torch.zeros(world_size, world_size, dtype=torch.float64)
    for rank in range(world_size):
        receivers = TOPOLOGIES[topology](rank, world_size, step)
        matrix[[rank, *receivers], rank] = 1 / (1 + len(receivers))
    return matrix


@dataclass
class Round:
    """An exchange under way: W, this replica's x of each bucket, the receivers, and a buffer for each sender."""

    matrix: Tensor
    own: list[Tensor]
    receivers: list[int]
    inboxes: dict[int, list[Tensor]]
    posted: Posted


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """The parameters to every neighbour; a copy to send and one of each neighbour. The first steps average."""
    topology, ranks = config.strategy.topology or DEFAULT_TOPOLOGY, sizes.world_size
    neighbours = len(TOPOLOGIES[topology](0, ranks, 0))
    payload, held = sizes.nbytes, (1 + neighbours) * sizes.nbytes
    if config.strategy.codec != "none":
        dtype = {4: torch.float32, 8: torch.float64}[sizes.itemsize]
        payload = payload_bytes(config.strategy, Subject(sizes.shapes, dtype))
        edges = neighbours if topology == "ring" else (ranks - 1).bit_length()
        held = (1 + 2 * edges) * sizes.nbytes + neighbours * payload
    return Cost(sent=neighbours * (payload + 8 * (topology == "push-sum")), held=held)


class Gossip(Sync, Guardable):
    """See the module. A neighbour that dies is left out, its part kept; its micro-batches are not computed again."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        topology = self.options.topology or DEFAULT_TOPOLOGY
        choose("--topology", topology, TOPOLOGIES)
        self.matrix = partial(mixing_matrix, topology, wire.world_size)
        self.push_sum = topology == "push-sum"
        self.overlaps = self.options.overlap_steps != 0
        self.mixing = self.options.mixing or default_mixing(self.options)
        self.copies: Copies | None = None  # where what is sent is encoded
        self.members = self.peers = Peers(wire)
        self.weight = torch.ones(1, dtype=torch.float64)  # w_i of push-sum, for ever 1 otherwise
        self.rounds = 0
        self.under_way: Round | None = None
        self._outbox: list[Tensor] = []
        self._inboxes: list[list[Tensor]] = []

    def attach(self, replica: Replica) -> None:
        if self.options.codec != "none":
            rank, turn = self._wire.rank, range(self._wire.world_size.bit_length())
            edges = torch.stack([self.matrix(step) for step in turn]).sum(0)
            self.copies = Copies(
                self.options,
                replica.buckets.all,
                senders=[peer for peer in self.peers.alive if edges[rank, peer]],
                receivers=[peer for peer in self.peers.alive if edges[peer, rank]],
            )
        if self.overlaps:
            replica.buckets.listen(on_begin=lambda: self._start(replica))

    def step(self, replica: Replica, step: Step) -> None:
        if self.overlaps:
            self._mix(replica, step)
        self._update(replica, step)
        if not self.overlaps:
            self._mix(replica, step)

    @contextmanager
    def shared_model(self, replica: Replica) -> Iterator[None]:
        # The mean of the replicas that answer; with push-sum sum_i w_i z_i / sum_i w_i, which mixing conserves. It is
        # the same bits on every rank, sends (N - 1) P, and holds a copy of the parameters meanwhile.
        own = [read(bucket) for bucket in replica.buckets]
        for bucket, flat in zip(replica.buckets, self._numerators(replica), strict=True):
            weighed = torch.cat([flat, self.weight.to(flat)])
            total = torch.stack(self.peers.gather(weighed)).sum(0)
            write(bucket, total[:-1] / total[-1])
        try:
            yield
        finally:
            for bucket, flat in zip(replica.buckets, own, strict=True):
                write(bucket, flat)

    def metrics(self) -> dict[str, float]:
        # How far the neighbours received in the last step were from this replica, as a part of its own norm.
        return {"sync/consensus_distance": self.drift}

    def state_dict(self) -> State:
        # The number of exchanges, which decides the neighbours, the weight of push-sum, and the copies of a codec.
        copies = self.copies.state_dict() if self.copies else {}
        return {"rounds": torch.tensor([self.rounds]), "weight": self.weight} | copies

    def load_state_dict(self, states: Sequence[State]) -> None:
        # With another number of ranks all start from the mean, whose weight is 1, and of which no copies are needed.
        same = len(states) == self._wire.world_size
        state = states[self._wire.rank if same else 0]
        self.rounds = int(state["rounds"])
        if same:
            self.weight.copy_(state["weight"])
        if self.copies:
            self.copies.load_state_dict(state if same else None)

    def _start(self, replica: Replica) -> Round:
        matrix, rank = self.matrix(self.rounds), self._wire.rank
        senders = [peer for peer in self.peers.alive if matrix[rank, peer]]
        receivers = [peer for peer in self.peers.alive if matrix[peer, rank]]
        own, weight = self._numerators(replica), [self.weight] * self.push_sum
        sent = {peer: (self.copies.encode(peer, own) if self.copies else own) + weight for peer in receivers}
        room = (self.copies.room() if self.copies else own) + weight
        while len(self._inboxes) < len(senders):
            self._inboxes.append([torch.empty_like(tensor) for tensor in room])
        inboxes = dict(zip(senders, self._inboxes, strict=False))
        posted = self.peers.start(
            sent=((peer, tensor) for peer, tensors in sent.items() for tensor in tensors),
            received=((peer, tensor) for peer, inbox in inboxes.items() for tensor in inbox),
        )
        self.rounds += 1
        self.under_way = Round(matrix, own, receivers, inboxes, posted)
        return self.under_way

    def _numerators(self, replica: Replica) -> list[Tensor]:
        """x_i = w_i z_i of each bucket, in buffers that stay unchanged while they are sent."""
        if not self._outbox:
            self._outbox = [torch.zeros_like(bucket.flat, device="cpu") for bucket in replica.buckets]
        for bucket, flat in zip(replica.buckets, self._outbox, strict=True):
            _read(bucket, flat)
            if self.weight != 1:
                flat.mul_(self.weight.item())
        return self._outbox

    def _mix(self, replica: Replica, step: Step) -> None:
        """Finish the exchange under way, or a whole one, and average: the replica holds z_i afterwards."""
        with step.timed("communication"):
            exchange = self.under_way or self._start(replica)
            self.under_way = None
            self.peers.wait(exchange.posted)
        alive, matrix, rank = self.peers.alive, exchange.matrix, self._wire.rank
        inboxes = {peer: inbox for peer, inbox in exchange.inboxes.items() if peer in alive}
        theirs = {peer: self.copies.receive(peer, x) if self.copies else x for peer, x in inboxes.items()}
        added = {peer: self.mixing * matrix[rank, peer].item() for peer in theirs}
        given = {
            peer: self.mixing * matrix[peer, rank].item() for peer in exchange.receivers if peer in alive
        }
        weights = {peer: inbox[-1].item() if self.push_sum else 1.0 for peer, inbox in inboxes.items()}
        self.drift = self._distance(exchange.own, theirs, weights)
        kept, terms = self._terms(theirs, added, given)
        for i, mixed in enumerate(exchange.own):
            mixed.mul_(kept)
            for tensors, part in terms:
                mixed.add_(tensors[i], alpha=part)
        if self.push_sum:
            self.weight.mul_(1 - sum(given.values())).add_(sum(added[peer] * weights[peer] for peer in added))
        for bucket, mixed in zip(replica.buckets, exchange.own, strict=True):
            write(bucket, mixed if self.weight == 1 else mixed / self.weight.item())

    def _terms(
        self, theirs: dict[int, list[Tensor]], added: dict[int, float], given: dict[int, float]
    ) -> tuple[float, list[tuple[list[Tensor], float]]]:
        """The terms of an average: the part of this replica that is kept, and the tensors to add, each with its part.

        What a replica gives is subtracted: from itself, or from the copy that the receiver has. Where a rank has
        died, what is added and what is given may be unequal. An average then keeps more or less of this replica, so
        that the parts add up to one; in push-sum the weight makes up for it.
        """
        kept = 1.0 if self.push_sum else 1 - sum(added.values()) + sum(given.values())
        terms = [(theirs[peer], part) for peer, part in added.items()]
        if self.copies is None:
            return kept - sum(given.values()), terms
        return kept, terms + [(self.copies.of_own[peer], -part) for peer, part in given.items()]

    def _distance(
        self, own: list[Tensor], theirs: dict[int, list[Tensor]], weights: dict[int, float]
    ) -> float:
        """The root mean square over the neighbours of |z_j - z_i| / |z_i|; 0 where there are none."""
        inverse = 1 / self.weight.item()
        squares = [
            sum(
                (x / weights[peer] - y * inverse).square().sum().item()
                for x, y in zip(tensors, own, strict=False)
            )
            for peer, tensors in theirs.items()
        ]
        norm = inverse**2 * sum(x.square().sum().item() for x in own)
        return float((sum(squares) / len(squares) / norm) ** 0.5) if squares and norm else 0.0

    def _update(self, replica: Replica, step: Step) -> None:
        """Have the optimizer step x_i = w_i z_i."""
        weight = self.weight.item()
        _scale(replica, weight)
        # Divided by 1/N, so that the mean of all replicas follows the gradient of the step.
        replica.update(step, 1 / self._wire.world_size)
        _scale(replica, 1 / weight)


@torch.no_grad()
def _read(bucket: Bucket, flat: Tensor) -> None:
    for p, part in bucket.parts(flat):
        part.copy_(p)


@torch.no_grad()
def _scale(replica: Replica, factor: float) -> None:
    if factor != 1:
        torch._foreach_mul_([p for _, p in replica.params], factor)
