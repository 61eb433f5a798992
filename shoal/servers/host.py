"""A server behind a lock, in the process of one worker, with a thread for each worker of another process."""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.optim.optimizers import NamedParams
from shoal.servers.connections import Connection, accept, describe
from shoal.servers.core import END, Halted, ParameterServer, Push, norm_of
from shoal.servers.messages import PULLS, PUSHES, Kind, Reply, Request
from shoal.servers.push_format import PushFormat
from shoal.wire.pairs import Bell, Door, Guest
from shoal.wire.waits import WAITS

NOTHING = torch.empty(0, dtype=torch.float64)
EMPTY = Reply(
    version=0, clock=0, workers=0, staleness=0, bound=-1, numbers=0, text=0, last=-1, waits=0, rate=0.0, squares=0.0
)  # fmt: skip
STILL_HERE = replace(EMPTY, waits=1)
SIGNAL_SECONDS = 1.0  # how often a waiting worker is sent a sign that the server is alive

Signal = Callable[[], None]


def no_signal() -> None:
    """For a worker in this process, which needs no sign that the server is alive."""


class Host:
    """Answers workers one at a time, and lets each wait until the server's update rule allows it to go on.

    `say` is called with one line of text whenever a worker comes back or is lost.
    """

    def __init__(self, server: ParameterServer, push_format: PushFormat, say: Callable[[str], None]) -> None:
        self.server = server
        self.push_format = push_format
        self.say = say
        self.last = (
            -1
        )  # the number of steps after which all stop, once somebody has asked for it; negative: nobody has
        self.connections: dict[int, Connection] = {}  # of the workers in other processes
        self._begun = False
        self._changed = threading.Condition()
        self._served: dict[int, int] = {}  # worker -> the clock of its last pull that was answered
        self._staleness: dict[int, int] = {}  # worker -> that of its last push
        self._numbers: dict[int, Tensor] = {}
        self._sent_before = 0  # bytes over connections that are closed

    @property
    def bytes_sent(self) -> int:
        """To all workers so far."""
        with self._changed:
            return self._sent_before + sum(connection.bytes_sent for connection in self.connections.values())

    def open(self, door: str, *, share_memory: bool) -> None:
        """Accept workers at the door of that name, from now on."""
        guests = Door(door)
        args = (guests, share_memory)
        threading.Thread(target=self._accept_all, args=args, name=door, daemon=True).start()

    def listen(self, bell: Bell, more: int) -> None:
        """When the bell is rung, let all workers stop `more` steps after those that the foremost has pushed."""
        args = (bell, more)
        threading.Thread(target=self._stop_all, args=args, name="stop", daemon=True).start()

    def begin(self, params: NamedParams, workers: Iterable[int], first_step: int) -> None:
        """Start from these values at this step. Workers wait until then."""
        with self._changed:
            self.server.begin(params, workers, first_step)
            self._begun = True
            self._changed.notify_all()

    def push(
        self,
        request: Request,
        gradient: Tensor | None,
        numbers: Tensor = NOTHING,
        waiting: Signal = no_signal,
    ) -> None:
        """Process a push. `gradient` must stay unchanged until `pushed` or `pull` returns.

        `waiting` is called every SIGNAL_SECONDS while this waits, here and below.
        """
        push = Push(
            request.worker, request.clock, request.version, request.labels, request.step_labels, gradient
        )
        with self._changed:
            self._wait(lambda: self._begun, waiting)
            if self.server.push(push):
                self._staleness[request.worker] = self.server.rule.staleness
            if numbers.numel():
                self._numbers[request.worker] = numbers
            self._changed.notify_all()

    def pushed(self, request: Request, waiting: Signal = no_signal) -> tuple[Reply, Tensor]:
        """Wait until the outcome of a push is known. Raises Halted when nobody can go on."""
        with self._changed:
            self._wait(lambda: self.server.answers(request.clock), waiting)
            return self._reply(request)

    def pull(self, request: Request, into: Tensor, waiting: Signal = no_signal) -> tuple[Reply, Tensor]:
        """Copy the parameters into `into` [n] as soon as the worker may have them; for a PEEK at once.

        In an EXCHANGE the norm is that of this server, which must be the only one.
        """
        with self._changed:
            self._wait(lambda: self._begun, waiting)
            if request.kind == Kind.PEEK:
                self.server.read(request.worker, into)
                return self._reply(request)
            norm = request.norm
            if request.kind != Kind.PULL:
                self._wait(lambda: self.server.answers(request.clock), waiting)
                norm = norm_of(self.server.rule.squares(request.clock))
            self.server.ask(request.worker, request.needed, norm)
            self._changed.notify_all()
            self._wait(lambda: self.server.opens(request.needed), waiting)
            self.server.read(request.worker, into)
            return self._reply(request)

    def leave(self, worker: int, cause: str = "") -> None:
        """A worker has left in order; with a `cause` it was lost, which is printed."""
        with self._changed:
            step = self.server.clocks.get(worker, 0)
            self.server.leave(worker, parted=not cause)
            self._numbers.pop(worker, None)
            self._changed.notify_all()
            left = len(self.server.active)
            failure = self.server.failure
        if cause:
            then = "none is left" if not left else "the others cannot go on" if failure else f"{left} go on"
            self.say(f"worker {worker} is gone after step {step} ({cause}): {then}")

    def tighten(self, bound: int) -> None:
        """Allow workers to be at most `bound` steps ahead of the last one, from now on."""
        with self._changed:
            self.server.rule.bound = bound

    def state(self) -> dict[str, Tensor]:
        """A copy of the optimizers' state at one moment."""
        with self._changed:
            return {name: tensor.clone() for name, tensor in self.server.optimizer_state.tensors()}

    def serve_all(self, clock: int) -> None:
        """Wait until every worker of another process has been sent the parameters of `clock`, or is lost."""
        with self._changed:
            self._wait(lambda: all(self._served.get(worker, -1) >= clock for worker in self.connections))

    def close(self) -> None:
        """Wait until every worker has left."""
        with self._changed:
            self._changed.wait_for(lambda: not self.connections)

    def _stop_all(self, bell: Bell, more: int) -> None:
        with suppress(PeerLost):  # the run has ended
            bell.wait()
            with self._changed:
                self._wait(lambda: self._begun)
                steps = [clock for clock in self.server.clocks.values() if clock != END]
                self.last = max(steps, default=0) + more

    def _wait(self, predicate: Callable[[], bool], waiting: Signal = no_signal) -> None:
        with WAITS.on("an answer of the servers"):
            while not self._changed.wait_for(
                lambda: bool(self.server.failure) or predicate(), SIGNAL_SECONDS
            ):
                waiting()
        if self.server.failure:
            raise Halted(self.server.failure)

    def _reply(self, request: Request) -> tuple[Reply, Tensor]:
        rule = self.server.rule
        others = [numbers for other, numbers in self._numbers.items() if other != request.worker]
        numbers = torch.stack(others).sum(0) if others else NOTHING
        reply = Reply(
            version=self.server.version,
            clock=rule.clock(self.server),
            workers=len(self.server.active),
            staleness=self._staleness.get(request.worker, 0),
            bound=rule.bound,
            numbers=numbers.numel(),
            text=0,
            last=self.last,
            waits=0,
            rate=self.server.rate,
            squares=rule.squares(request.clock),
        )
        return reply, numbers

    def _accept_all(self, door: Door, share_memory: bool) -> None:
        """Accept workers for as long as the process lives."""
        with suppress(PeerLost):  # the store is gone
            while True:
                args = (door.wait(), share_memory)
                threading.Thread(target=self._serve, args=args, name=door.name, daemon=True).start()

    def _serve(self, guest: Guest, share_memory: bool) -> None:
        """Answer one worker until it leaves."""
        worker = guest.number
        torch.set_num_threads(1)  # of this thread, since the worker of this process needs the cores
        connection, cause = None, ""
        try:
            connection = accept(
                guest.meet(), self.push_format.nbytes, self.server.flat.nbytes, share_memory=share_memory
            )
            self._add(worker, connection)
            connection.expect_payload()
            while (request := Request.unpack(connection.receive_header())).kind != Kind.LEAVE:
                self._answer(request, connection)
                connection.expect_payload()
        except PeerLost as error:
            cause = error.how
        except Exception as error:  # no other thread would notice, and all workers would wait
            self._fail(f"the parameter server failed: {type(error).__name__}: {error}")
            raise
        if connection is None:
            return
        with self._changed:
            newest = self.connections.get(worker) is connection
            if newest:
                self._sent_before += self.connections.pop(worker).bytes_sent
        if newest:  # else it has come back over another connection
            self.leave(worker, cause)

    def _fail(self, why: str) -> None:
        with self._changed:
            self.server.failure = why
            self._changed.notify_all()

    def _add(self, worker: int, connection: Connection) -> None:
        with self._changed:
            back = worker in self.server.gone
            before = self.connections.get(worker)
            self._sent_before += before.bytes_sent if before else 0
            self.connections[worker] = connection
            self.server.join(worker)
            self._changed.notify_all()
        if back:
            self.say(f"worker {worker} is back")

    def _answer(self, request: Request, connection: Connection) -> None:
        """Answer one request. Raises PeerLost."""
        numbers = connection.receive_numbers(request.numbers)
        gradient, signals = None, []
        waiting = lambda: signals.extend(connection.send(STILL_HERE.pack()))  # noqa: E731
        if request.kind in PUSHES:
            connection.receive_payload()
            gradient = self.push_format.unwrap(connection.incoming)
        try:
            if request.kind == Kind.STATE:
                _send_state(connection, self.state())
                return
            if request.kind in (*PUSHES, Kind.SKIP):
                self.push(request, gradient, numbers, waiting)
            if request.kind in PULLS:
                reply, others = self.pull(request, connection.outgoing.view(self.server.flat.dtype), waiting)
                connection.finish([*signals, *connection.send(reply.pack(), others, payload=True)])
                self._note_served(request)
            else:
                reply, others = self.pushed(request, waiting)
                connection.finish([*signals, *connection.send(reply.pack(), others)])
        except Halted as halted:
            connection.finish(connection.send(replace(EMPTY, text=-len(halted.how.encode())).pack()))
            connection.send_text(halted.how)

    def _note_served(self, request: Request) -> None:
        with self._changed:
            self._served[request.worker] = request.needed
            self._changed.notify_all()


def _send_state(connection: Connection, state: dict[str, Tensor]) -> None:
    description = describe(state)
    connection.finish(connection.send(replace(EMPTY, text=len(description.encode())).pack()))
    connection.send_text(description)
    connection.send_tensors(state.values())
