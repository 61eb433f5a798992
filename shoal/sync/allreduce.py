"""Synchronous all-reduce: every step all replicas add up their gradients, then update alike."""

import time
from collections.abc import Callable, Sequence

import torch

from shoal.codecs.sums import EncodedSum, EncodedSums
from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.optim.optimizers import OneBitAdam
from shoal.replica import TINY, Replica, Step
from shoal.sync.base import State, Sync
from shoal.sync.exact import start_exact_sum
from shoal.tensors.buckets import Bucket
from shoal.wire.wire import Wire, Work


class AllReduce(Sync):
    """Sums each bucket over the replicas while the backward pass still makes the next one.

    A codec encodes what is sent: right where a step's gradients take longer to send than to compute, and never
    where the link is faster than the encoding. `clip_each` and `normalize each` change what a rank sends by its own
    whole gradient, which is only there after the backward pass: then nothing travels beside it.
    """

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        self.exchange = EncodedSums(self.options, wire, config.train.seed)
        self.keys: dict[Bucket, str] = {}  # the names of the buckets
        self.pending: list[Callable[[], Work | EncodedSum]] = []  # called, each waits for its first exchange
        self.changes_own = bool(self.options.clip_each) or self.options.normalize == "each"

    def attach(self, replica: Replica) -> None:
        """Have every complete bucket sent at once."""
        self.keys = {bucket: str(i) for i, bucket in enumerate(replica.buckets)}
        if replica.buckets.exact:
            replica.buckets.on_complete = lambda bucket: self.pending.append(
                start_exact_sum(self.wire, bucket, replica.shares)
            )
        elif not self.changes_own:
            replica.buckets.on_complete = self._start
        for optimizer in replica.optimizers:
            if isinstance(optimizer, OneBitAdam):
                optimizer.is_momentum = lambda: self.exchange.encodes

    def step(self, replica: Replica, step: Step) -> None:
        """Wait for the sums, then update."""
        started = time.perf_counter()
        if self.changes_own:
            self._change_own(replica, step)
            for bucket in self.keys:
                self._start(bucket)
        for work in [finish() for finish in self.pending]:
            work.wait()
        self.pending.clear()
        step.seconds.communication += time.perf_counter() - started
        replica.update(step)

    def state_dict(self) -> State:
        """What the codec left out, and what else it remembers."""
        return self.exchange.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        """By the exchange's rule."""
        self.exchange.load_state_dict(states)

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """The gradients, encoded; uncoded and in exact mode a reduce-scatter and an all-gather of them."""
        options = config.strategy
        return Cost(EncodedSums.bytes_sent(options, sizes), EncodedSums.bytes_held(options, sizes))

    def _start(self, bucket: Bucket) -> None:
        self.pending.append(self.exchange.start_sum(self.keys[bucket], bucket.flat, bucket.shapes))

    def _change_own(self, replica: Replica, step: Step) -> None:
        """Clip or normalise this rank's gradient a label by its own norm. Not the same as doing so to the sum."""
        own = torch.stack([bucket.flat.norm() for bucket in replica.buckets]).norm()
        norm = replica.island.norm(own) / (step.own_fraction or 1)
        scale = 1 / (norm + TINY)
        if self.options.clip_each:
            scale = (self.options.clip_each * scale).clamp(max=1.0)
        for bucket in replica.buckets:
            bucket.flat.mul_(scale)
