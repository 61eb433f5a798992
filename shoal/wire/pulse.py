"""The pulse: a sign of life from each rank to rank 0 every second, and rank 0's answer, in a thread of its own.

It tells which rank is silent, busy or gone, which a collective does not: it only waits. A rank whose process dies is
known at once, by the end of its connection; one that is stopped, or behind a broken link, after SILENT seconds. No
rank is given up for its silence: a link may come back. The messages are short lines of JSON on a TCP connection of
their own, so a bulk transfer delays them by its queue, and no longer.
"""

import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from shoal.errors import PeerLost, Preempted, ShoalError, described
from shoal.system import output
from shoal.wire import meeting
from shoal.wire.hosts import Host, Interface
from shoal.wire.lines import Line
from shoal.wire.rendezvous import Rendezvous
from shoal.wire.waits import LONG, WAITS, Wait

BEAT = 1.0  # seconds between two signs of life; more ranks than CROWD beat less often, which bounds rank 0's work
CROWD = 100
SILENT = 4.0  # beats without a sign of life: seconds, where there are no more ranks than CROWD
UNNOTICED = 8.0  # seconds of waiting for a rank that is gone
ASK = 2.0  # seconds that a rank waits to hear who is gone
DIED = "its process has ended"
LOOPBACK = "127.0.0.1"


@contextmanager
def pulsing(
    rendezvous: Rendezvous, hosts: Sequence[Host], store: dist.Store, way: Interface | None
) -> Iterator["Pulse | None"]:
    """A pulse within the block, None for a rank that is alone. A PeerLost that leaves it says who is gone and why."""
    if rendezvous.world_size == 1:
        yield None
        return
    pulse = Pulse(rendezvous.rank, hosts, store, rendezvous.token, way.address if way else LOOPBACK)
    why = ""
    try:
        yield pulse
    except PeerLost as error:
        raise pulse.named(error) from error
    except Exception as error:
        if not isinstance(error, Preempted):
            why = str(error) if isinstance(error, ShoalError) else described(error)
        raise
    finally:
        pulse.stop(why)


@dataclass
class View:
    """What is known of the other ranks: who is silent, who waits for nobody, who is gone and why."""

    silent: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)


class Pulse:
    """This rank's end. Rank 0 listens on `address`, and every rank has what makes its `token` known."""

    def __init__(self, rank: int, hosts: Sequence[Host], store: dist.Store, token: str, address: str) -> None:
        self.rank, self.hosts, self.view = rank, hosts, View()
        self.processor_seconds = 0.0  # of its thread
        self.longest_gap = 0.0  # seconds in which nothing was heard of another rank that is there
        # Called where this rank waits for one that is gone, and gloo has not noticed, which happens under load.
        self.give_up: Callable[[PeerLost], object] = lambda lost: None
        self._beat = BEAT * max(1.0, len(hosts) / CROWD)
        self._token = token
        self._lines: list[Line] = []  # of rank 0: one of each other rank; of another: the one to rank 0
        others = range(1, len(hosts)) if rank == 0 else range(1)
        self._heard = dict.fromkeys(others, time.monotonic())  # when, by rank
        self._left: set[int] = set()
        self._waiting: set[int] = set()
        self._said = 0.0
        self._told = threading.Event()  # somebody is gone
        self._wake, self._woken = socket.socketpair()
        self._listener = socket.create_server((address, 0)) if rank == 0 else None
        if self._listener is not None:
            self._listener.setblocking(False)
            store.set("pulse", json.dumps([address, self._listener.getsockname()[1]]))
        self._at: list[Any] = json.loads(store.get("pulse"))
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self, why: str = "") -> None:
        """Take leave of the others; `why` is the error that ends this rank, if it is its own."""
        self._wake.send(json.dumps(why[:500]).encode())
        self._thread.join(ASK)

    def named(self, error: PeerLost) -> PeerLost:
        """The same error with the rank that is gone and why, if that is known or comes to be known soon."""
        if not error.is_silent:
            self._told.wait(ASK)
        gone, silent = self.view.gone, self.view.silent
        lost = next(iter(gone or silent), error.rank)
        who = "" if lost is None else self.name(lost)
        how = gone.get(-1 if lost is None else lost, error.how)
        return PeerLost(lost, self._place(error.what), how, who)

    def stuck(self) -> str:
        """What this rank waits for, in words, if it waits in vain: another is silent; else nothing."""
        wait = WAITS.current
        if wait is None or wait.seconds < BEAT:
            return ""
        # Who waits long though another is gone waits for it: it was not told, or waits for one that was.
        absent = self.view.silent or (list(self.view.gone) if wait.seconds > SILENT else [])
        return self._described(wait, absent, "silent") if absent else ""

    def name(self, rank: int) -> str:
        """`worker 3`, with its host where there are several."""
        several = len({host.machine for host in self.hosts}) > 1
        return f"worker {rank}" + (f" on {self.hosts[rank].name}" if several else "")

    def _run(self) -> None:
        turned = time.monotonic() - self._beat  # the first sign of life goes out at once
        while True:
            due = turned + self._beat - time.monotonic()
            readers: list[Any] = [
                self._woken, *self._lines, *([self._listener] if self._listener else [])
            ]  # fmt: skip
            ready, _, _ = select.select(readers, (), (), max(0.0, due))
            now = time.monotonic()
            if now - turned > self._beat + SILENT / 2:  # this process was stopped: it has not listened
                self._heard = dict.fromkeys(self._heard, now)
            if self._woken in ready:
                self._take_leave(json.loads(self._woken.recv(1 << 12)))
                return
            for each in ready:
                self._accept() if each is self._listener else self._hear(each)
            if now - turned >= self._beat:
                turned = now
                self._turn(now)
                self.processor_seconds = time.thread_time()

    def _turn(self, now: float) -> None:
        wait = WAITS.current
        if self.rank == 0:
            self._look_around(now)
        else:
            self._report(wait, now)
        if wait is not None and wait.seconds > LONG and now - self._said > LONG:
            self._say(wait, now)
        if wait is not None and wait.seconds > UNNOTICED:
            for rank in self.view.gone.keys() & {*wait.ranks}:
                self.give_up(self.named(PeerLost(rank, wait.what, self.view.gone[rank])))

    def _look_around(self, now: float) -> None:
        """Rank 0: who is silent and who is busy, for itself and for those that wait."""
        self.view.silent = self._unheard(now)
        absent = {*self.view.silent, *self._left, *self.view.gone}
        self.view.busy = [rank for rank in self._heard if rank not in absent | self._waiting]

    def _report(self, wait: Wait | None, now: float) -> None:
        """Another rank: a sign of life to rank 0, over a new connection where there is none."""
        if not self._lines:
            self._connect()
        self.view.silent = sorted({*self.view.silent} - {0} | {*self._unheard(now)})
        for line in list(self._lines):
            try:
                line.send({"waits": wait is not None and wait.seconds > self._beat})
            except OSError:
                self._drop(line)

    def _unheard(self, now: float) -> list[int]:
        limit = SILENT * self._beat  # which is at least a second
        present = [rank for rank in self._heard if rank not in self._left and rank not in self.view.gone]
        return [rank for rank in present if now - self._heard[rank] > limit]

    def _connect(self) -> None:
        with suppress(OSError):
            line = Line(socket.create_connection(tuple(self._at), timeout=SILENT / 2))
            line.rank = 0
            line.send({"rank": self.rank, "proof": self._proof(self.rank)})
            self._lines.append(line)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            connection, _ = self._listener.accept()
            self._lines.append(Line(connection))

    def _hear(self, line: Line) -> None:
        try:
            for message in line.receive():
                self._take(line, message)
                if line.rank is not None:
                    now = time.monotonic()
                    self.longest_gap = max(self.longest_gap, now - self._heard[line.rank])
                    self._heard[line.rank] = now
        except (OSError, KeyError, TypeError, ValueError):  # it has ended, or carries what no rank would send
            self._drop(line)

    def _take(self, line: Line, message: dict[str, Any]) -> None:
        if "left" in message:
            who = line.rank
            if who is not None:
                self._left.add(who)
                if message["left"]:
                    self._lose(who, f"it failed: {message['left']}")
        elif line.rank is None:
            rank = message.get("rank")
            if not isinstance(rank, int) or not hmac.compare_digest(
                str(message.get("proof")), self._proof(rank)
            ):
                raise ConnectionError("a stranger")
            line.rank = rank
        elif self.rank == 0:
            (self._waiting.add if message.get("waits") else self._waiting.discard)(line.rank)
            others = [rank for rank in self.view.busy if rank != line.rank]
            if WAITS.current is None:
                others = [0, *others]
            line.send(
                {
                    "silent": self.view.silent,
                    "busy": others if message.get("waits") else [],
                    "gone": self.view.gone,
                }
            )
        else:
            self.view.silent, self.view.busy = message["silent"], message["busy"]
            for rank, why in message["gone"].items():
                self._lose(int(rank), why)

    def _drop(self, line: Line) -> None:
        """A connection has ended: its rank has left, or is gone."""
        line.socket.close()
        self._lines.remove(line)
        if line.rank is not None and line.rank not in self._left:
            self._lose(line.rank, DIED)

    def _lose(self, rank: int, why: str) -> None:
        if rank in self.view.gone:
            return
        self.view.gone[rank] = why
        self._told.set()
        if self.rank == 0:  # who waits for it learns it now
            for line in self._lines:
                with suppress(OSError):
                    line.send({"silent": self.view.silent, "busy": [], "gone": self.view.gone})

    def _take_leave(self, why: str) -> None:
        for line in self._lines:
            with suppress(OSError):
                line.send({"left": why})
        for each in (*self._lines, self._listener, self._wake, self._woken):
            if each is not None:
                (each.socket if isinstance(each, Line) else each).close()

    def _say(self, wait: Wait, now: float) -> None:
        silent = self.view.silent
        missing, state = (silent, "silent") if silent else (self.view.busy, "busy")
        machine = self.hosts[self.rank].machine
        here = [rank for rank, host in enumerate(self.hosts) if host.machine == machine]
        if self.rank == next((rank for rank in here if rank not in missing), None):  # one of each machine
            self._said = now
            output.say(
                f"shoal: waiting for {self._described(wait, missing, state)}, for {wait.seconds:.0f} s"
            )

    def _described(self, wait: Wait, missing: list[int], state: str) -> str:
        wanted = [rank for rank in missing if not wait.ranks or rank in wait.ranks] or missing
        names = ", ".join(map(self.name, wanted[: meeting.NAMED])) or "the others"
        return f"{names}{f' ({state})' if wanted else ''} in {self._place(wait.what)}"

    def _place(self, what: str) -> str:
        return f"{what} of step {WAITS.step}" if WAITS.step else what

    def _proof(self, rank: int) -> str:
        return hmac.new(self._token.encode(), f"pulse {rank}".encode(), "sha256").hexdigest()
