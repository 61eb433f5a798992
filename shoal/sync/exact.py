"""Exact mode: the sum of a bucket over the ranks, in the order of one fixed tree."""

from collections.abc import Callable
from itertools import chain

import torch

from shoal.replica import Shares
from shoal.tensors.buckets import Bucket
from shoal.tensors.tree_sum import Node, TreeSum, roots
from shoal.wire.wire import Exchange, Wire


def start_exact_sum(wire: Wire, bucket: Bucket, shares: Shares) -> Callable[[], Exchange]:
    """Begin to sum a bucket in the order of the tree of `shoal.tensors.tree_sum`, whatever the shares.

    Each rank receives all ranks' roots of one part of the bucket and finishes the tree for it; then all ranks gather
    the parts. The bytes are those of a ring as long as a share is one root.
    """
    part = bucket.flat.numel() // wire.world_size
    nodes = _roots_by_rank(shares)
    own = [tensor.view(wire.world_size, part) for _, tensor in bucket.tree.pending]
    sent = own[0] if len(own) == 1 else torch.cat(own, dim=1)
    bucket.tree.pending.clear()
    received = bucket.flat.new_empty(sum(map(len, nodes)), part)
    counts = [part * len(held) for held in nodes]
    work = wire.start_exchange(received.view(-1), counts, sent.reshape(-1))

    def finish() -> Exchange:
        work.wait()
        tree = TreeSum()
        for node, tensor in zip(chain(*nodes), received, strict=True):
            tree.push(node, tensor, owned=True)
        return wire.start_all_gather(bucket.flat, tree.finish())

    return finish


def _roots_by_rank(shares: Shares) -> list[list[Node]]:
    """The roots that each rank holds."""
    ends = [sum(shares.counts[: r + 1]) for r in range(len(shares.counts))]
    return [roots(end - count, end) for end, count in zip(ends, shares.counts, strict=True)]
