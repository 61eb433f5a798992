"""Ranks as a grid with named axes, and a wire along each."""

import hashlib
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from shoal.errors import Preempted, UserError
from shoal.system import devices
from shoal.wire import meeting
from shoal.wire.hosts import Host, Interface
from shoal.wire.lost import peer_lost
from shoal.wire.meeting import Met
from shoal.wire.pulse import Pulse, pulsing
from shoal.wire.rendezvous import Rendezvous
from shoal.wire.waits import WAITS
from shoal.wire.wire import Wire

# The outermost first: the ranks of an island, which hold one replica, are neighbours, and among them those of a team,
# which compute a micro-batch together.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")
# Several axes as one. ZeRO cuts over all ranks that compute other tokens with the same weights.
MERGED = {"island": AXES[1:], "team": AXES[2:], "zero": ("shard", "context")}


@dataclass(frozen=True)
class Axis:
    """The ranks that differ in one coordinate only: how many, which of them this is, and their process group."""

    size: int
    index: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This process among the others. `group` has all of them; `axes` has every axis of more than one rank.

    `replicate` is always among them, and before `cut` the only one.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    axes: Mapping[str, Axis]
    hosts: tuple[Host, ...] = ()  # by rank
    interface: Interface | None = None  # by which this rank reaches the others
    pulse: Pulse | None = None  # of a world of several ranks
    epoch: int = 0  # of the membership: a mesh of other ranks has a higher one, and wires of its own
    _wires: dict[str, Wire] = field(default_factory=dict, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0

    @property
    def replicate(self) -> Axis:
        """The ranks that hold the same part of the other replicas."""
        return self.axes["replicate"]

    @property
    def teams(self) -> int:
        """The number of teams. Each computes micro-batches of its own."""
        return self.world_size // self.size("team")

    @property
    def team(self) -> int:
        """The team of this rank."""
        return self.rank // self.size("team")

    def size(self, axis: str) -> int:
        """How many ranks an axis has, or a merged axis; 1 where the mesh has none of that name."""
        return self.axes[axis].size if axis in self.axes else 1

    def index(self, axis: str) -> int:
        """Which of them this rank is."""
        return self.axes[axis].index if axis in self.axes else 0

    def wire(self, axis: str) -> Wire:
        """The wire along an axis or a merged axis, or to all ranks: "world". It is the same one at each call.

        Where every rank holds a whole replica, "world" is "replicate".
        """
        if axis == "world" and self.replicate.size == self.world_size:
            axis = "replicate"
        if axis not in self._wires:
            self._wires[axis] = Wire(self.group if axis == "world" else self.axes[axis].group)
        return self._wires[axis]

    @property
    def training_wires(self) -> list[Wire]:
        """Those over which parameters, gradients and activations travel."""
        return [wire for axis, wire in self._wires.items() if axis not in ("world", "island")]

    @property
    def bytes_sent(self) -> int:
        """By this rank over `training_wires`, so far."""
        return sum(wire.bytes_sent for wire in self.training_wires)

    @property
    def seconds_waited(self) -> float:
        """By this rank, for others, so far."""
        return sum(wire.seconds_waited for wire in self._wires.values())

    def cut(self, sizes: Mapping[str, int]) -> "Mesh":
        """The same ranks as a grid of these sizes, which multiply to the world size. Every rank must call it."""
        shape = [sizes.get(axis, 1) for axis in AXES]
        assert math.prod(shape) == self.world_size, (sizes, self.world_size)
        if shape[0] == self.world_size:
            return self
        grid = torch.arange(self.world_size).view(shape)
        named = {axis: (axis,) for axis in AXES} | MERGED
        along = {name: self._ranks_along(grid, axes) for name, axes in named.items()}
        along = {name: ranks for name, ranks in along.items() if len(ranks) > 1 or name == "replicate"}
        groups = {ranks: meeting.new_group(list(ranks)) for ranks in dict.fromkeys(along.values())}
        axes = {name: Axis(len(r), r.index(self.rank), groups[r]) for name, r in along.items()}
        return replace(self, axes=axes, epoch=self.epoch + 1, _wires={})

    def _ranks_along(self, grid: torch.Tensor, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes only, in their order."""
        dims = [AXES.index(axis) for axis in axes]
        moved = grid.movedim(dims, list(range(-len(dims), 0)))
        rows = moved.reshape(-1, math.prod(grid.shape[dim] for dim in dims)).tolist()
        (ranks,) = [tuple(row) for row in rows if self.rank in row]
        return ranks


@contextmanager
def join(
    rendezvous: Rendezvous,
    device_name: str = "cpu",
    facts: Mapping[str, str] | None = None,
    met: Callable[[Met], None] = lambda found: None,
) -> Iterator[Mesh]:
    """Meet the other ranks, and part from them at the end. One process alone is a world of size 1.

    `met` hears on every rank what became known at the meeting, such as which `facts` are not alike, before anything
    is exchanged; it may raise. Raises UserError where the meeting cannot be, and where several ranks use one GPU.
    """
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    store = dist.PrefixStore(f"attempt{rendezvous.attempt}", meeting.open_store(rendezvous))
    found = meeting.meet(store, rendezvous, facts or {})
    WAITS.begin()
    way, hosts = found.way, tuple(found.hosts)
    with pulsing(rendezvous, hosts, store, way) as pulse, _parting(store, rendezvous, pulse):
        met(found)
        with _group(store, rendezvous, cuda=cuda) as group:
            if cuda:
                check_own(devices.identity(str(device)), rendezvous.world_size)
            rank, world_size = rendezvous.rank, rendezvous.world_size
            axes = {"replicate": Axis(world_size, rank, group)}
            yield Mesh(rank, world_size, device, group, axes, hosts, way, pulse)


@contextmanager
def _group(store: dist.Store, rendezvous: Rendezvous, *, cuda: bool) -> Iterator[dist.ProcessGroup]:
    """The process group of all ranks."""
    with WAITS.on("the first connection"), peer_lost("the first connection"):
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo",
            store=store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=meeting.TIMEOUT,
        )
    try:
        yield dist.distributed_c10d._get_default_group()
    finally:
        dist.destroy_process_group()


@contextmanager
def _parting(store: dist.Store, rendezvous: Rendezvous, pulse: Pulse | None) -> Iterator[None]:
    """Rank 0 keeps the store until the others have left, unless an error that is its own ends it."""
    gone = pulse.view.gone if pulse else {}
    try:
        yield
    except (Preempted, UserError):
        meeting.part(store, rendezvous, gone)
        raise
    else:
        meeting.part(store, rendezvous, gone)


def check_own(identity: str, world_size: int) -> None:
    """Raise UserError on every rank if several ranks use one GPU: NCCL would fail at the first exchange.

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
