"""Ranks as a grid with named axes. The only maker of process groups."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.placement import Placement

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for the slowest rank


@dataclass(frozen=True)
class Mesh:
    """This process among the others. `group` is the process group of the `replicate` axis."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0


@contextmanager
def join(placement: Placement) -> Iterator[Mesh]:
    """Meet the other ranks, and part from them at the end. One process alone is a world of size 1."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", placement.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = _store(placement)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=dist.PrefixStore(f"attempt{placement.attempt}", store),
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=TIMEOUT,
    )
    try:
        yield Mesh(placement.rank, placement.world_size, device, dist.distributed_c10d._get_default_group())
    finally:
        dist.destroy_process_group()


def neighbours(group: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """Of the groups that cut `group` into runs of `size` ranks the one of this rank. Every rank must call it."""
    ranks = dist.get_process_group_ranks(group)
    runs = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    groups = [dist.new_group(run) for run in runs]
    return groups[dist.get_rank(group) // size]


def _store(placement: Placement) -> dist.Store:
    """The key-value store where ranks meet. It listens on the address that was named, and on no other."""
    serves = placement.rank == 0 and not placement.served
    port, listen_fd = placement.port, placement.store_fd
    if serves and listen_fd is None:
        listener = socket.create_server((placement.address, port))
        port, listen_fd = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        placement.address,
        port,
        placement.world_size,
        is_master=serves,
        timeout=TIMEOUT,
        master_listen_fd=listen_fd if serves else None,
    )


def own_store() -> dist.Store:
    """A connection of one's own to the store: a thread that waits on a shared one would hold up the others."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def pair(store: dist.Store, name: str, number: int, patience: timedelta) -> dist.ProcessGroup:
    """A group of two processes, of which this is number 0 or 1. It is made when both have given `name`.

    Raises RuntimeError when the other has not come after `patience`.
    """
    group: Any = dist.ProcessGroupGloo(dist.PrefixStore(name, store), number, 2, patience)
    return group
