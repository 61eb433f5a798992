"""A server at work: behind a lock, in the process of one worker, with a thread for each of the others."""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.optim.optimizers import NamedParams
from shoal.servers.connections import Line, describe, welcome
from shoal.servers.core import END, Halted, ParameterServer, Push, norm_of
from shoal.servers.messages import PULLS, PUSHES, Kind, Reply, Request
from shoal.servers.parcels import Parcels
from shoal.wire.pairs import Bell, Door, Guest

NOTHING = torch.empty(0, dtype=torch.float64)
EMPTY = Reply(
    version=0, clock=0, workers=0, staleness=0, bound=-1, told=0, text=0, last=-1, waits=0, rate=0.0, squares=0.0
)  # fmt: skip
STILL_HERE = replace(EMPTY, waits=1)
WORD_SECONDS = 1.0  # how often a worker that waits hears that the server is there

Still = Callable[[], None]


def nobody() -> None:
    """For a worker in this process, which knows that the server is there."""


class Host:
    """Answers workers one at a time, and has each wait until the server's policy lets it go on.

    `say` gets a line whenever a worker comes back or is gone.
    """

    def __init__(self, server: ParameterServer, parcels: Parcels, say: Callable[[str], None]) -> None:
        self.server = server
        self.parcels = parcels
        self.say = say
        self.last = -1  # the steps after which all stop, once somebody has asked for it
        self.lines: dict[int, Line] = {}  # of the workers in other processes
        self._begun = False
        self._changed = threading.Condition()
        self._served: dict[int, int] = {}  # worker -> the clock of its last pull that was answered
        self._staleness: dict[int, int] = {}  # worker -> that of its last push
        self._told: dict[int, Tensor] = {}
        self._sent_before = 0  # over lines that are gone

    @property
    def bytes_sent(self) -> int:
        """To all workers so far."""
        with self._changed:
            return self._sent_before + sum(line.bytes_sent for line in self.lines.values())

    def open(self, door: str, *, share_memory: bool) -> None:
        """Let workers in at the door of that name, from now on."""
        guests = Door(door)
        args = (guests, share_memory)
        threading.Thread(target=self._mind, args=args, name=door, daemon=True).start()

    def listen(self, bell: Bell, more: int) -> None:
        """When the bell is rung, have all workers stop `more` steps after those that the foremost has pushed."""
        args = (bell, more)
        threading.Thread(target=self._stop_all, args=args, name="stop", daemon=True).start()

    def begin(self, params: NamedParams, workers: Iterable[int], first_step: int) -> None:
        """Start from these values at this step; until then workers wait."""
        with self._changed:
            self.server.begin(params, workers, first_step)
            self._begun = True
            self._changed.notify_all()

    def push(
        self, request: Request, gradient: Tensor | None, told: Tensor = NOTHING, still: Still = nobody
    ) -> None:
        """Take a push. `gradient` must stay as it is until `pushed` or `pull` returns.

        `still` is called every WORD_SECONDS while this waits, here and below.
        """
        push = Push(
            request.worker, request.clock, request.version, request.labels, request.step_labels, gradient
        )
        with self._changed:
            self._wait(lambda: self._begun, still)
            if self.server.push(push):
                self._staleness[request.worker] = self.server.policy.staleness
            if told.numel():
                self._told[request.worker] = told
            self._changed.notify_all()

    def pushed(self, request: Request, still: Still = nobody) -> tuple[Reply, Tensor]:
        """Wait until it is known what became of a push. Raises Halted when nothing can go on."""
        with self._changed:
            self._wait(lambda: self.server.answers(request.clock), still)
            return self._reply(request)

    def pull(self, request: Request, into: Tensor, still: Still = nobody) -> tuple[Reply, Tensor]:
        """Copy the parameters into `into` [n] as soon as the worker may have them, or as they are for a PEEK.

        In an EXCHANGE the norm is that of this server, which must be the only one.
        """
        with self._changed:
            self._wait(lambda: self._begun, still)
            if request.kind == Kind.PEEK:
                self.server.read(request.worker, into)
                return self._reply(request)
            norm = request.norm
            if request.kind != Kind.PULL:
                self._wait(lambda: self.server.answers(request.clock), still)
                norm = norm_of(self.server.policy.squares(request.clock))
            self.server.ask(request.worker, request.needed, norm)
            self._changed.notify_all()
            self._wait(lambda: self.server.opens(request.needed), still)
            self.server.read(request.worker, into)
            return self._reply(request)

    def leave(self, worker: int, cause: str = "") -> None:
        """A worker has parted; with a `cause` it is gone without a word, which is said."""
        with self._changed:
            step = self.server.clocks.get(worker, 0)
            self.server.leave(worker, parted=not cause)
            self._told.pop(worker, None)
            self._changed.notify_all()
            left = len(self.server.active)
            failure = self.server.failure
        if cause:
            then = "none is left" if not left else "the others cannot go on" if failure else f"{left} go on"
            self.say(f"worker {worker} is gone after step {step} ({cause}): {then}")

    def tighten(self, bound: int) -> None:
        """From now on tell workers that they may be at most so many steps ahead of the last one."""
        with self._changed:
            self.server.policy.bound = bound

    def state(self) -> dict[str, Tensor]:
        """A copy of the optimizers' state at one moment."""
        with self._changed:
            return {name: tensor.clone() for name, tensor in self.server.optimizer_state.tensors()}

    def serve_all(self, clock: int) -> None:
        """Wait until every worker elsewhere has been sent the parameters of `clock`, or is gone."""
        with self._changed:
            self._wait(lambda: all(self._served.get(worker, -1) >= clock for worker in self.lines))

    def close(self) -> None:
        """Wait until every worker has left."""
        with self._changed:
            self._changed.wait_for(lambda: not self.lines)

    def _stop_all(self, bell: Bell, more: int) -> None:
        with suppress(PeerLost, Halted):  # the run has ended
            bell.wait()
            with self._changed:
                self._wait(lambda: self._begun)
                steps = [clock for clock in self.server.clocks.values() if clock != END]
                self.last = max(steps, default=0) + more

    def _wait(self, predicate: Callable[[], bool], still: Still = nobody) -> None:
        while not self._changed.wait_for(lambda: bool(self.server.failure) or predicate(), WORD_SECONDS):
            still()
        if self.server.failure:
            raise Halted(self.server.failure)

    def _reply(self, request: Request) -> tuple[Reply, Tensor]:
        policy = self.server.policy
        others = [told for other, told in self._told.items() if other != request.worker]
        told = torch.stack(others).sum(0) if others else NOTHING
        reply = Reply(
            version=self.server.version,
            clock=policy.clock(self.server),
            workers=len(self.server.active),
            staleness=self._staleness.get(request.worker, 0),
            bound=policy.bound,
            told=told.numel(),
            text=0,
            last=self.last,
            waits=0,
            rate=self.server.rate,
            squares=policy.squares(request.clock),
        )
        return reply, told

    def _mind(self, door: Door, share_memory: bool) -> None:
        """Let in whoever comes, for as long as the process lives."""
        with suppress(PeerLost):  # the place to meet at is gone
            while True:
                args = (door.wait(), share_memory)
                threading.Thread(target=self._attend, args=args, name=door.name, daemon=True).start()

    def _attend(self, guest: Guest, share_memory: bool) -> None:
        """Talk to one worker until it leaves."""
        worker = guest.number
        torch.set_num_threads(1)  # of this thread: the worker beside it has the cores
        line, cause = None, ""
        try:
            line = welcome(
                guest.meet(), self.parcels.nbytes, self.server.flat.nbytes, share_memory=share_memory
            )
            self._let_in(worker, line)
            line.expect_payload()
            while (request := Request.unpack(line.receive_header())).kind != Kind.LEAVE:
                self._answer(request, line)
                line.expect_payload()
        except PeerLost as error:
            cause = error.how
        except Exception as error:  # nobody else would hear of it, and all would wait
            self._fail(f"the parameter server failed: {type(error).__name__}: {error}")
            raise
        if line is None:
            return
        with self._changed:
            newest = self.lines.get(worker) is line
            if newest:
                self._sent_before += self.lines.pop(worker).bytes_sent
        if newest:  # else it has come back by another line
            self.leave(worker, cause)

    def _fail(self, why: str) -> None:
        with self._changed:
            self.server.failure = why
            self._changed.notify_all()

    def _let_in(self, worker: int, line: Line) -> None:
        with self._changed:
            back = worker in self.server.gone
            before = self.lines.get(worker)
            self._sent_before += before.bytes_sent if before else 0
            self.lines[worker] = line
            self.server.join(worker)
            self._changed.notify_all()
        if back:
            self.say(f"worker {worker} is back")

    def _answer(self, request: Request, line: Line) -> None:
        """Do what a worker asks for. Raises PeerLost."""
        told = line.receive_told(request.told)
        gradient, words = None, []
        still = lambda: words.extend(line.send(STILL_HERE.pack()))  # noqa: E731
        if request.kind in PUSHES:
            line.receive_payload()
            gradient = self.parcels.unwrap(line.incoming)
        try:
            if request.kind == Kind.STATE:
                _send_state(line, self.state())
                return
            if request.kind in (*PUSHES, Kind.SKIP):
                self.push(request, gradient, told, still)
            if request.kind in PULLS:
                reply, others = self.pull(request, line.outgoing.view(self.server.flat.dtype), still)
                line.finish([*words, *line.send(reply.pack(), others, payload=True)])
                self._note_served(request)
            else:
                reply, others = self.pushed(request, still)
                line.finish([*words, *line.send(reply.pack(), others)])
        except Halted as halted:
            line.finish(line.send(replace(EMPTY, text=-len(str(halted).encode())).pack()))
            line.send_text(str(halted))

    def _note_served(self, request: Request) -> None:
        with self._changed:
            self._served[request.worker] = request.needed
            self._changed.notify_all()


def _send_state(line: Line, state: dict[str, Tensor]) -> None:
    description = describe(state)
    line.finish(line.send(replace(EMPTY, text=len(description.encode())).pack()))
    line.send_text(description)
    line.send_tensors(state.values())
