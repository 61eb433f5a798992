"""Synchronous all-reduce: every step all replicas add up their gradients, then update alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from shoal.buckets import Bucket
from shoal.collectives import Wire, Work
from shoal.config import RunConfig
from shoal.replica import Replica, Shares
from shoal.summation import Node, TreeSum, roots

Exchange = Callable[[], Work]  # a started one: called, it waits for the first half and starts the second


@dataclass
class AllReduce:
    """Sums each bucket over the replicas while the backward pass still makes the next one.

    In exact mode the sum follows the tree of `shoal.summation`: each rank gathers every rank's roots of one part
    of the bucket, finishes the tree for that part, and all gather the parts: the bytes of a ring, as long as
    a share is one root.
    """

    wire: Wire
    pending: list[Exchange] = field(default_factory=list)

    @classmethod
    def from_config(cls, config: RunConfig, wire: Wire) -> "AllReduce":
        """As every entry of `SYNCS`."""
        return cls(wire)

    def attach(self, replica: Replica) -> None:
        """Have every complete bucket sent at once."""
        start = self._start_exact if replica.buckets.exact else self._start
        replica.buckets.on_complete = lambda bucket: self.pending.append(start(bucket, replica.shares))

    def step(self, replica: Replica, step: int) -> None:
        """Wait for the sums, then update."""
        started = time.perf_counter()
        for work in [finish() for finish in self.pending]:
            work.wait()
        self.pending.clear()
        replica.seconds.communication += time.perf_counter() - started
        replica.update(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a step."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""

    def _start(self, bucket: Bucket, shares: Shares) -> Exchange:
        work = self.wire.start_all_reduce(bucket.flat)
        return lambda: work

    def _start_exact(self, bucket: Bucket, shares: Shares) -> Exchange:
        part = bucket.flat.numel() // self.wire.world_size
        nodes = _roots_by_rank(shares)
        own = [tensor.view(self.wire.world_size, part) for _, tensor in bucket.tree.pending]
        sent = own[0] if len(own) == 1 else torch.cat(own, dim=1)
        bucket.tree.pending.clear()
        received = bucket.flat.new_empty(sum(map(len, nodes)), part)
        counts = [part * len(held) for held in nodes]
        work = self.wire.start_exchange(received.view(-1), counts, sent.reshape(-1))

        def finish() -> Work:
            work.wait()
            tree = TreeSum()
            for node, tensor in zip(chain(*nodes), received, strict=True):
                tree.push(node, tensor, owned=True)
            return self.wire.start_all_gather(bucket.flat, tree.finish())

        return finish


def _roots_by_rank(shares: Shares) -> list[list[Node]]:
    """The roots that each rank holds."""
    ends = [sum(shares.counts[: r + 1]) for r in range(len(shares.counts))]
    return [roots(end - count, end) for end, count in zip(ends, shares.counts, strict=True)]


def bytes_sent(gradient_bytes: int, world_size: int) -> int:
    """What a rank sends in a step: a reduce-scatter and an all-gather of the gradients, in either mode."""
    return 2 * gradient_bytes * (world_size - 1) // world_size
