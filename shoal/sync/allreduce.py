"""Synchronous all-reduce: every step all replicas add up their gradients, then update alike."""

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
from shoal.wire.wire import Exchange, Wire


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """The gradients, encoded; uncoded and in exact mode a reduce-scatter and an all-gather of them."""
    options = config.strategy
    return Cost(EncodedSums.bytes_sent(options, sizes), EncodedSums.bytes_held(options, sizes))


class AllReduce(Sync):
    """Sums each bucket over the replicas while the backward pass still computes the next one.

    Use a codec where a step's gradients take longer to send than to compute, and never where the link is faster than
    the encoding. `clip_each` and `normalize each` scale what a rank sends by the norm of its own whole gradient,
    which is known after the backward pass only: then sums and backward pass do not overlap.
    """

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        self.sums = EncodedSums(self.options, wire, config.train.seed)
        self.keys: dict[Bucket, str] = {}  # the names of the buckets
        self.pending: list[
            Callable[[], Exchange | EncodedSum]
        ] = []  # each, when called, waits for its first exchange
        self.changes_own = bool(self.options.clip_each) or self.options.normalize == "each"

    def attach(self, replica: Replica) -> None:
        self.keys = {bucket: str(i) for i, bucket in enumerate(replica.buckets)}
        replica.buckets.listen(on_complete=lambda bucket: self.send(replica, bucket))
        for optimizer in replica.optimizers:
            if isinstance(optimizer, OneBitAdam):
                optimizer.is_momentum = lambda: self.sums.encodes

    def send(self, replica: Replica, bucket: Bucket) -> None:
        """Begin to sum a complete bucket, where it is sent as it is."""
        if replica.buckets.exact:
            self.pending.append(start_exact_sum(self._wire, bucket, replica.shares))
        elif not self.changes_own:
            self._start(bucket)

    def step(self, replica: Replica, step: Step) -> None:
        with step.timed("communication"):
            if self.changes_own:
                self._change_own(replica, step)
                for bucket in self.keys:
                    self._start(bucket)
            for work in [finish() for finish in self.pending]:
                work.wait()
            self.pending.clear()
            self.sums.commit()
        replica.update(step)

    def state_dict(self) -> State:
        return self.sums.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        self.sums.load_state_dict(states)

    def _start(self, bucket: Bucket) -> None:
        self.pending.append(self.sums.start_sum(self.keys[bucket], bucket.flat, bucket.shapes))

    def _change_own(self, replica: Replica, step: Step) -> None:
        """Clip or normalise this replica's gradient per label by its own norm, which differs from that of the sum."""
        own = torch.stack([bucket.flat.norm() for bucket in replica.buckets]).norm()
        norm = replica.norm(own) / (step.own_fraction or 1)
        scale = 1 / (norm + TINY)
        if self.options.clip_each:
            scale = (self.options.clip_each * scale).clamp(max=1.0)
        for bucket in replica.buckets:
            bucket.flat.mul_(scale)
