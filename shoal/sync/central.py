"""What the strategies with a parameter server have in common: servers beside the first ranks, a worker on every rank.

The first `--servers` ranks each hold a range of the parameters, their optimizer, and a thread for every worker of
another rank. A replica's own optimizers stay empty, but for rank 0's at a save: then they hold a copy of the servers'
state, so that a checkpoint is that of one replica, and a run can go on under any strategy and number of servers.
"""

import itertools
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoal.codecs import Subject, make
from shoal.codecs.sums import EncodedSums, warm
from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.errors import UserError
from shoal.optim import optimizers
from shoal.optim.optimizers import NamedParams
from shoal.replica import Replica, Step
from shoal.servers.client import Servers
from shoal.servers.connections import Line, approach
from shoal.servers.core import ParameterServer, Policy
from shoal.servers.host import Host
from shoal.servers.links import Link, Local, Remote
from shoal.servers.parcels import Parcels
from shoal.servers.ranges import cut, runs
from shoal.sync.base import State, Sync
from shoal.wire.wire import Bell, Visitor, Wire

CATCH_UP = 4  # the most steps that a worker takes, once all stop, to reach the foremost
_DOORS = itertools.count()  # every rank attaches equally often, and so finds the same doors


class Central(Sync):
    """A worker of parameter servers, and on the first ranks the host of one."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        servers, workers = config.strategy.servers, wire.world_size
        if servers > workers and config.strategy.codec != "none":  # which remembers by server
            found = f"each is beside a worker, and there are {workers}"
            raise UserError(f"--servers {servers}", found, f"take at most {workers}")
        self.count = min(servers, workers)
        self.config = config
        self.options = config.strategy
        self.exchange = EncodedSums(self.options, wire, config.train.seed)
        self.host: Host | None = None
        self.begun = self.finished = False
        self.done = 0  # steps, by this worker
        self.since = 0  # steps since this worker heard that all stop
        self._sent_before = 0

    @abstractmethod
    def policy(self, replica: Replica) -> Policy:
        """A new policy of a server."""

    @abstractmethod
    def turn(self, replica: Replica, step: Step) -> None:
        """Push the gradients of `step`, and have the replica hold parameters for the next."""

    def build(self, params: NamedParams) -> list[Optimizer]:
        """New optimizers of a server. Only here are parameters updated, and only here do they decay."""
        return optimizers.of(self.config, params)

    def attach(self, replica: Replica) -> None:
        """Open the doors of the servers, and have a line to each."""
        ranges = cut(replica.params, self.count)
        # Ranks that hold other pieces of a replica have servers of their own.
        number = next(_DOORS)
        doors = f"servers/{number}/{replica.island.place}"
        self.bell = Bell(f"stop/{number}")
        if self.wire.rank < len(ranges):
            params = ranges[self.wire.rank]
            server = ParameterServer(params, self.build, self.policy(replica))
            self.host = Host(server, self._parcels(self.wire.rank, params), self._say)
            if self.wire.world_size > 1:
                self.host.open(f"{doors}/{self.wire.rank}", share_memory=self.options.share_memory)
            if self.wire.rank == 0:
                self.host.listen(Bell(f"stop/{number}"), 1 + self.ahead)
        visitor = Visitor(self.wire.rank)
        links = [self._link(s, params, visitor, f"{doors}/{s}") for s, params in enumerate(ranges)]
        self.servers = Servers(links, ranges, self.wire.rank)

    def step(self, replica: Replica, step: Step) -> None:
        """Let the servers begin, if this is the first one, and exchange."""
        if not self.begun:
            self._begin(replica, step.number)
        started = time.perf_counter()
        self.turn(replica, step)
        self.done = step.number + 1
        step.seconds.communication += time.perf_counter() - started
        self._count_bytes()

    def _count_bytes(self) -> None:
        sent = self.servers.bytes_sent + (self.host.bytes_sent if self.host else 0)
        self.wire.bytes_sent += sent - self._sent_before
        self._sent_before = sent

    def finish(self, replica: Replica) -> None:
        """After the last step: wait for the other workers, take the final parameters, and part from all."""
        if not self.begun:
            return
        self.servers.wait_for_all()
        self.servers.load()
        self._show_state(replica)
        self.servers.leave()
        if self.host is not None:
            self.host.close()
        self._count_bytes()
        self.finished = True

    @property
    def ahead(self) -> int:
        """The pushes of its own that a worker does not wait for."""
        return 0

    def wish(self) -> None:
        """Ring the bell of rank 0's server, which tells all with its next replies after which step they stop."""
        self.bell.ring()

    @property
    def hears_wish(self) -> bool:
        """Whether the server here has heard it."""
        return self.host is not None and self.host.last >= 0

    def decided(self, numbers: Tensor) -> Tensor:
        """`numbers`, whose last one is a wish to stop, with whether this worker stops here in its place.

        All stop after the same step, beyond which none has pushed, so that a run that goes on from there takes no
        sample twice. A worker far behind does not reach that step: its share of the steps between is left out.
        """
        if self.wire.world_size == 1:
            return numbers
        if numbers[-1] > 0:
            self.wish()
        self.since += self.servers.last >= 0
        behind = max(0, self.servers.last - self.done)
        stops = self.since > 0 and (not behind or self.since > CATCH_UP)
        if stops and behind:
            said = f"worker {self.wire.rank} stops {behind} steps behind: its share of them is left out"
            print(f"shoal: {said}", file=sys.stderr, flush=True)
        self.reached = self.servers.last if stops else 0
        numbers[-1] = stops
        return numbers

    @contextmanager
    def shared_model(self, replica: Replica) -> Iterator[None]:
        """The servers' parameters, with which the replica goes on."""
        if self.begun and not self.finished:
            self.servers.peek()
            self.servers.load()
            self._show_state(replica)
        yield

    def state_dict(self) -> State:
        """What the codec left out."""
        return self.exchange.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Take it back by the rule of the exchange."""
        self.exchange.load_state_dict(states)

    def _begin(self, replica: Replica, step: int) -> None:
        """The replica now holds what training starts from: an initial model, or a checkpoint's."""
        if self.host is not None:
            held = dict(replica.optimizer_state.tensors())
            self.host.server.optimizer_state.load(lambda name: _parts_of(name, held))
            self.host.begin(self.servers.ranges[self.wire.rank], range(self.wire.world_size), step)
        for optimizer in replica.optimizers:
            optimizer.state.clear()
        self.begun = True

    def _show_state(self, replica: Replica) -> None:
        if self.wire.rank == 0:
            held = self.servers.state()
            replica.optimizer_state.load(lambda name: _parts_of(name, held))

    def _link(self, number: int, params: NamedParams, visitor: Visitor, door: str) -> Link:
        parcels = self._parcels(number, params)
        if self.host is not None and number == self.wire.rank:
            return Local(self.host, self.wire.rank, parcels)
        down = sum(p.nbytes for _, p in params)
        connect = partial(_connect, visitor, door, parcels.nbytes, down)
        return Remote(connect, f"the parameter server in rank {number}", parcels)

    def _parcels(self, number: int, params: NamedParams) -> Parcels:
        numel, dtype = sum(p.numel() for _, p in params), params[0][1].dtype
        if self.options.codec == "none":
            return Parcels.plain(numel, dtype)
        like, shapes, key = torch.empty(numel, dtype=dtype), [p.shape for _, p in params], f"server{number}"
        return Parcels(
            numel,
            dtype,
            self.exchange.payload_bytes(like, shapes),
            lambda gradient: self.exchange.encode_for(key, gradient, shapes),
            lambda payload: self.exchange.decode(key, payload, like, shapes),
        )

    def _say(self, text: str) -> None:
        if self.wire.rank == 0:  # the other servers see the same
            print(f"server: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Traffic:
    """The bytes of each server: of its range as it goes out, and of a gradient for it as it comes in."""

    down: list[int]
    up: list[int]

    @classmethod
    def of(cls, config: RunConfig, sizes: Sizes) -> "Traffic":
        """As `attach` cuts the parameters."""
        dtype = {4: torch.float32, 8: torch.float64}[sizes.itemsize]
        cuts = runs([shape.numel() for shape in sizes.shapes], min(config.strategy.servers, sizes.world_size))
        subjects = [Subject(tuple(sizes.shapes[run.start : run.stop]), dtype) for run in cuts]
        options = warm(config.strategy)
        return cls(
            [sizes.itemsize * subject.numel for subject in subjects],
            [make(options, subject).nbytes(subject.numel) for subject in subjects],
        )

    def most(self, world_size: int) -> Cost:
        """What the rank sends and holds that does so most: one with a server."""
        ranks = range(world_size)
        return Cost(
            sent=max(self.sent(rank, world_size) for rank in ranks),
            held=max(self.held(rank, world_size) for rank in ranks),
        )

    def sent(self, rank: int, world_size: int) -> int:
        """By `rank` in a step: gradients to servers elsewhere, and from its own server the range to all other ranks.

        That is P bytes for a worker; and (N - 1) P / S + P - P / S where one of S even servers is.
        """
        own = rank < len(self.down)
        gradients = sum(self.up) - (self.up[rank] if own else 0)
        return gradients + (world_size - 1) * (self.down[rank] if own else 0)

    def held(self, rank: int, world_size: int) -> int:
        """By `rank`, beside the replica and its optimizer, whose state the server has instead.

        Every worker a gradient on its way out and parameters on their way in: 2 P. A server its range and its
        gradient, and for each worker elsewhere a gradient that has come and parameters that go: 2 N P / S.
        """
        worker = sum(self.down) + sum(self.up)
        if rank >= len(self.down):
            return worker
        return worker + 2 * self.down[rank] + (world_size - 1) * (self.down[rank] + self.up[rank])


def _connect(visitor: Visitor, door: str, up: int, down: int, **knocking: timedelta) -> Line:
    return approach(visitor.knock(door, **knocking), up, down)


def _parts_of(name: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}
