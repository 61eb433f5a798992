"""What the strategies with a parameter server have in common: a worker on every rank, servers on the first ranks.

The first `--servers` ranks each hold a range of the parameters, their optimizer, and a thread for every worker of
another rank. A replica's own optimizers stay empty, but for rank 0's at a save: then they hold a copy of the servers'
state, so that a checkpoint is that of one replica, and a run can continue with any strategy and number of servers.
"""

import itertools
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
from shoal.servers.client import ServerClient
from shoal.servers.connections import Connection, connect
from shoal.servers.core import ParameterServer, UpdateRule
from shoal.servers.host import Host
from shoal.servers.push_format import PushFormat
from shoal.servers.ranges import cut, runs
from shoal.servers.stubs import LocalStub, RemoteStub, ServerStub
from shoal.sync.base import State, Sync
from shoal.sync.members import say
from shoal.sync.server_members import ServerMembers
from shoal.wire.pairs import Bell, Visitor
from shoal.wire.wire import Wire

_DOORS = itertools.count()  # for the names of doors: every rank attaches equally often


class ServerStrategy(Sync):
    """A worker of parameter servers, and on the first ranks the host of one.

    `wait`: workers wait for each other at the end of every step. `alone`: rank 0 evaluates while the others train.
    """

    ahead = 0  # the pushes of its own that a worker does not wait for

    def __init__(self, config: RunConfig, wire: Wire, *, wait: bool, alone: bool) -> None:
        super().__init__(config, wire)
        self.members: ServerMembers = ServerMembers(wire, self._leave, wait=wait, alone=alone)
        servers, workers = config.strategy.servers, wire.world_size
        if servers > workers and config.strategy.codec != "none":  # whose state is that of a server
            found = f"each is beside a worker, and there are {workers}"
            raise UserError(f"--servers {servers}", found, f"take at most {workers}")
        self.count = min(servers, workers)
        self.config = config
        self.options = config.strategy
        self.encoder = EncodedSums(self.options, wire, config.train.seed)
        self.host: Host | None = None
        self.begun = self.finished = False
        self._sent_before = 0

    @abstractmethod
    def update_rule(self, replica: Replica) -> UpdateRule:
        """A new update rule for a server."""

    @abstractmethod
    def exchange(self, replica: Replica, step: Step) -> None:
        """Push the gradients of `step`, and load parameters for the next step into the replica."""

    def build(self, params: NamedParams) -> list[Optimizer]:
        """New optimizers for a server. Parameters are updated and decayed on servers only."""
        return optimizers.build(self.config.train.optim, params, optimizers.of_config(self.config))

    def attach(self, replica: Replica) -> None:
        ranges = cut(replica.params, self.count)
        # Ranks that hold other pieces of a replica have servers of their own.
        number = next(_DOORS)
        doors = f"servers/{number}/{replica.rank}"
        if self._wire.rank < len(ranges):
            params = ranges[self._wire.rank]
            server = ParameterServer(params, self.build, self.update_rule(replica))
            self.host = Host(server, self._push_format(self._wire.rank, params), self._say)
            if self._wire.world_size > 1:
                self.host.open(f"{doors}/{self._wire.rank}", share_memory=self.options.share_memory)
            if self._wire.rank == 0:
                self.host.listen(Bell(f"stop/{number}"), 1 + self.ahead)
        visitor = Visitor(self._wire.rank)
        stubs = [self._stub(s, params, visitor, f"{doors}/{s}") for s, params in enumerate(ranges)]
        self.servers = ServerClient(stubs, ranges, self._wire.rank)
        self.members.connect(self.servers, self.host, Bell(f"stop/{number}"))

    def step(self, replica: Replica, step: Step) -> None:
        if not self.begun:
            self._begin(replica, step.number)
        with step.timed("communication"):
            self.exchange(replica, step)
            self.members.count(step.number + 1)
        self._count_bytes()

    def _count_bytes(self) -> None:
        sent = self.servers.bytes_sent + (self.host.bytes_sent if self.host else 0)
        self._wire.count(sent - self._sent_before)
        self._sent_before = sent

    def _leave(self, replica: Replica) -> None:
        """Wait for the other workers, load the final parameters, and leave the servers."""
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

    @contextmanager
    def shared_model(self, replica: Replica) -> Iterator[None]:
        # The servers' parameters, with which the replica continues.
        if self.begun and not self.finished:
            self.servers.peek()
            self.servers.load()
            self._show_state(replica)
        yield

    def state_dict(self) -> State:
        return self.encoder.state_dict()

    def load_state_dict(self, states: Sequence[State]) -> None:
        self.encoder.load_state_dict(states)

    def _begin(self, replica: Replica, step: int) -> None:
        """Let the servers begin: the replica now holds the initial model, or that of a checkpoint."""
        if self.host is not None:
            held = dict(replica.optimizer_state.tensors())
            self.host.server.optimizer_state.load(lambda name: _parts_of(name, held))
            self.host.begin(self.servers.ranges[self._wire.rank], range(self._wire.world_size), step)
        for optimizer in replica.optimizers:
            optimizer.state.clear()
        self.begun = True

    def _show_state(self, replica: Replica) -> None:
        if self._wire.rank == 0:
            held = self.servers.state()
            replica.optimizer_state.load(lambda name: _parts_of(name, held))

    def _stub(self, number: int, params: NamedParams, visitor: Visitor, door: str) -> ServerStub:
        push_format = self._push_format(number, params)
        if self.host is not None and number == self._wire.rank:
            return LocalStub(self.host, self._wire.rank, push_format)
        down = sum(p.nbytes for _, p in params)
        connect = partial(_connect, visitor, door, push_format.nbytes, down)
        return RemoteStub(connect, f"the parameter server in rank {number}", push_format)

    def _push_format(self, number: int, params: NamedParams) -> PushFormat:
        numel, dtype = sum(p.numel() for _, p in params), params[0][1].dtype
        if self.options.codec == "none":
            return PushFormat.plain(numel, dtype)
        like, shapes, key = torch.empty(numel, dtype=dtype), [p.shape for _, p in params], f"server{number}"
        return PushFormat(
            numel,
            dtype,
            self.encoder.payload_bytes(like, shapes),
            lambda gradient: self.encoder.encode_for(key, gradient, shapes),
            lambda payload: self.encoder.decode(key, payload, like, shapes),
        )

    def _say(self, text: str) -> None:
        if self._wire.rank == 0:  # the other servers see the same
            say(f"server: {text}")


@dataclass(frozen=True)
class Traffic:
    """The bytes of each server: of the parameters that it sends to a worker, and of the gradient that it receives."""

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


def _connect(visitor: Visitor, door: str, up: int, down: int, **knocking: timedelta) -> Connection:
    return connect(visitor.knock(door, **knocking), up, down)


def _parts_of(name: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}
