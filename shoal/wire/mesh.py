"""Ranks as a grid with named axes. The only maker of process groups."""

import hashlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.errors import Preempted, ShoalError, UserError
from shoal.system import devices
from shoal.wire.rendezvous import Rendezvous

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for the slowest rank
JOIN = timedelta(hours=24)  # how long ranks wait for the last to come, which may have data to prepare before
WORD = timedelta(minutes=1)  # how often it is said who is awaited
LOOK = 0.1  # seconds: the longest pause between two looks
PARTING = 5.0  # seconds that the rank which keeps the store stays for the others, of whom some may have died

# The outermost first: the ranks of an island, which hold one replica, are neighbours, and among them those of a team,
# which compute a micro-batch together.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")
# Axes taken as one. What is cut by ZeRO is cut over all ranks that compute other tokens with the same weights.
MERGED = {"island": AXES[1:], "team": AXES[2:], "zero": ("shard", "context")}


@dataclass(frozen=True)
class Axis:
    """The ranks that differ in one coordinate only: how many, which of them this is, and their process group."""

    size: int
    index: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This process among the others. `group` has all of them; `axes` has the grid, as far as it has several ranks.

    `replicate` is always there, and at first alone.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    axes: Mapping[str, Axis]

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0

    @property
    def replicate(self) -> Axis:
        """The ranks that hold the same part of the other replicas: those that agree."""
        return self.axes["replicate"]

    @property
    def teams(self) -> int:
        """How many share the micro-batches of a step: each team computes its own ones."""
        return self.world_size // self.size("team")

    @property
    def team(self) -> int:
        """The team of this rank."""
        return self.rank // self.size("team")

    def size(self, axis: str) -> int:
        """How many ranks an axis has, or several taken as one; 1 where it is not there."""
        return self.axes[axis].size if axis in self.axes else 1

    def index(self, axis: str) -> int:
        """Which of them this rank is."""
        return self.axes[axis].index if axis in self.axes else 0

    def cut(self, sizes: Mapping[str, int]) -> "Mesh":
        """The same ranks as a grid of these sizes, which multiply to the world size. Every rank must call it."""
        shape = [sizes.get(axis, 1) for axis in AXES]
        assert math.prod(shape) == self.world_size, (sizes, self.world_size)
        if shape[0] == self.world_size:
            return self
        grid = torch.arange(self.world_size).view(shape)
        named = {axis: (axis,) for axis in AXES} | MERGED
        lines = {name: self._line(grid, axes) for name, axes in named.items()}
        lines = {name: ranks for name, ranks in lines.items() if len(ranks) > 1 or name == "replicate"}
        groups = {ranks: _group(list(ranks)) for ranks in dict.fromkeys(lines.values())}
        axes = {name: Axis(len(r), r.index(self.rank), groups[r]) for name, r in lines.items()}
        return replace(self, axes=axes)

    def _line(self, grid: torch.Tensor, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes only, in their order."""
        dims = [AXES.index(axis) for axis in axes]
        moved = grid.movedim(dims, list(range(-len(dims), 0)))
        lines = moved.reshape(-1, math.prod(grid.shape[dim] for dim in dims)).tolist()
        (line,) = [tuple(line) for line in lines if self.rank in line]
        return line


@contextmanager
def join(placement: Rendezvous, wanted: str = "auto") -> Iterator[Mesh]:
    """Meet the other ranks, and part from them at the end. One process alone is a world of size 1.

    `wanted` is the kind of device: auto, cpu or gpu. Raises UserError where there is none for this rank.
    """
    device = torch.device(devices.device_of(wanted, placement.local_rank, placement.local_size))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    store = dist.PrefixStore(f"attempt{placement.attempt}", _store(placement))
    _meet(store, placement)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=store,
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=TIMEOUT,
    )
    try:
        group = dist.distributed_c10d._get_default_group()
        axes = {"replicate": Axis(placement.world_size, placement.rank, group)}
        if cuda:
            check_own(devices.identity(str(device)), placement.world_size)
        yield Mesh(placement.rank, placement.world_size, device, group, axes)
    except Preempted:
        _part(store, placement)
        raise
    else:
        _part(store, placement)
    finally:
        dist.destroy_process_group()


def check_own(identity: str, world_size: int) -> None:
    """Refuse, on all ranks alike, a GPU that several ranks take: NCCL would fail at the first exchange.

    A worker that sees one GPU cannot know by itself whether others see the same one.
    """
    digest = hashlib.sha256(f"{socket.gethostname()} {identity}".encode()).digest()
    own = torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64)
    all_of_them = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(all_of_them, own)
    different = len({int(each) for each in all_of_them})
    if different < world_size:
        found = f"they see {different} GPU{'s' * (different > 1)}, and each takes one"
        change = (
            "start as many as GPUs, let the engine show each its own, or train on the cores: --device cpu"
        )
        raise UserError(f"{world_size} workers", found, change)


def neighbours(group: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """Of the groups that cut `group` into runs of `size` ranks the one of this rank. Every rank must call it."""
    ranks = dist.get_process_group_ranks(group)
    first = dist.get_rank(group) // size * size
    return _group(ranks[first : first + size])


def _group(ranks: list[int]) -> dist.ProcessGroup:
    """A group of these ranks, which they alone make: it goes by their names, whatever else others make meanwhile."""
    return dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)


def _store(placement: Rendezvous) -> dist.Store:
    """The key-value store where ranks meet. It listens on the address that was named, and on no other."""
    serves = _serves(placement)
    port, listen_fd = placement.port, placement.store_fd
    if not serves:
        where = f"worker 0 at {placement.address}:{port}"
        _await(lambda: _listens(placement.address, port), placement, lambda: where)
    if serves and listen_fd is None:
        listener = socket.create_server((placement.address, port))
        port, listen_fd = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        placement.address,
        port,
        placement.world_size,
        is_master=serves,
        timeout=JOIN,
        wait_for_workers=False,
        master_listen_fd=listen_fd if serves else None,
    )


def _listens(address: str, port: int) -> bool:
    """Whether the store's place is open. (Torch's own attempts would fill the screen.)"""
    try:
        socket.create_connection((address, port), timeout=WORD.total_seconds()).close()
    except OSError:
        return False
    return True


def _meet(store: dist.Store, placement: Rendezvous) -> None:
    """Wait until every rank is here, however long some prepare their data. Raises ShoalError after JOIN."""
    ranks = range(placement.world_size)
    store.set(f"here/{placement.rank}", "")
    if store.add("here", 1) == len(ranks):
        store.set("all here", "")

    def missing() -> str:
        return "worker " + ", ".join(str(rank) for rank in ranks if not store.check([f"here/{rank}"]))

    _await(lambda: store.check(["all here"]), placement, missing)


def _part(store: dist.Store, placement: Rendezvous) -> None:
    """Keep the store until the others have left too: they may still have to read what rank 0 wrote last."""
    with suppress(RuntimeError):  # the store is gone: nobody needs to hear of this rank
        store.add("left", 1)
        if not _serves(placement):
            return
        end = time.monotonic() + PARTING
        for _ in looks(lambda: store.add("left", 0) == placement.world_size or time.monotonic() > end):
            pass


def _serves(placement: Rendezvous) -> bool:
    return placement.rank == 0 and not placement.served


def _await(arrived: Callable[[], bool], placement: Rendezvous, awaited: Callable[[], str]) -> None:
    began = said = time.monotonic()
    for _ in looks(arrived):
        now = time.monotonic()
        if now - began > JOIN.total_seconds():
            raise ShoalError(f"{awaited()} did not come within {JOIN}; see what it has printed")
        if now - said > WORD.total_seconds():
            said = now
            if placement.local_rank == 0:  # one of each machine
                waited = timedelta(seconds=round(now - began))
                print(f"shoal: waiting for {awaited()}, since {waited}", file=sys.stderr, flush=True)


def looks(done: Callable[[], bool]) -> Iterator[None]:
    """Look whether it is `done`, ever less often; yields after each look that finds it is not.

    Python handles signals between two looks, and not within a call that waits.
    """
    pause = 0.001
    while not done():
        yield
        time.sleep(pause)
        pause = min(LOOK, 2 * pause)


def own_store() -> dist.Store:
    """A connection of one's own to the store: a thread that waits on a shared one would hold up the others."""
    return shared_store().clone()


def shared_store() -> Any:
    """The connection of this process to the store, for what does not wait."""
    return dist.distributed_c10d._get_default_store()


def pair(store: dist.Store, name: str, number: int, patience: timedelta) -> dist.ProcessGroup:
    """A group of two processes, of which this is number 0 or 1. It is made when both have given `name`.

    Raises RuntimeError when the other has not come after `patience`.
    """
    group: Any = dist.ProcessGroupGloo(dist.PrefixStore(name, store), number, 2, patience)
    return group
