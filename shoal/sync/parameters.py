"""The parameters of a replica as flat buffers, laid out as its gradient buckets; and their mean over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from shoal.replica import Replica
from shoal.tensors.buckets import Bucket
from shoal.wire.wire import Wire


@torch.no_grad()
def read(bucket: Bucket) -> Tensor:
    """A copy of the bucket's parameters, flat and padded as its gradients are."""
    flat = torch.zeros_like(bucket.flat)
    for p, part in bucket.parts(flat):
        part.copy_(p)
    return flat


@torch.no_grad()
def write(bucket: Bucket, flat: Tensor) -> None:
    """Copy `flat` into the bucket's parameters, in place."""
    for p, part in bucket.parts(flat):
        p.copy_(part)


def mean(replica: Replica, wire: Wire) -> list[Tensor]:
    """The mean of every bucket's parameters over the ranks of `wire`."""
    flats = [read(bucket) for bucket in replica.buckets]
    for work in [wire.start_all_reduce(flat) for flat in flats]:
        work.wait()
    return [flat.div_(wire.world_size) for flat in flats]


def apart(differences: list[Tensor], parameters: list[Tensor]) -> float:
    """The norm of all differences as a part of that of all parameters."""
    distance, length = get_total_norm(differences).item(), get_total_norm(parameters).item()
    return distance / length if length else 0.0


@contextmanager
def averaged(replica: Replica, wire: Wire) -> Iterator[None]:
    """Within it every replica holds the mean of all. Costs two more copies of the parameters meanwhile."""
    own = [read(bucket) for bucket in replica.buckets]
    for bucket, flat in zip(replica.buckets, mean(replica, wire), strict=True):
        write(bucket, flat)
    try:
        yield
    finally:
        for bucket, flat in zip(replica.buckets, own, strict=True):
            write(bucket, flat)
