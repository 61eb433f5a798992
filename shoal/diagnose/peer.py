"""Whether two hosts reach each other both ways, and how fast: the same command on both, with one address.

No torch, and no strategy: connections to ports that the system chooses, in both directions, as workers make them.
"""

import json
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shoal.diagnose.finding import Finding
from shoal.errors import ShoalError, UserError
from shoal.system import output
from shoal.wire.hosts import Interface, means_loopback, towards

PATIENCE = 5.0  # seconds for a connection, and for an answer
WORD = 10.0  # seconds between two lines that say who is awaited
ENOUGH = 0.5  # seconds: what was sent for so long gives the rate
FIRST, MOST = 1 << 16, 1 << 28  # bytes of the smallest and the largest message
PINGS = 20


@dataclass
class Other:
    """The other host: a connection to it, and the interface by which this host reaches it."""

    control: socket.socket
    way: Interface
    is_first: bool  # whether this host is the one at the address

    def __post_init__(self) -> None:
        self.control.settimeout(PATIENCE)
        self.control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self.control.makefile("rb")

    def tell(self, said: Any) -> Any:
        """Say something, and hear what the other says at this point."""
        self.control.sendall(json.dumps(said).encode() + b"\n")
        return json.loads(self._lines.readline(1 << 12))

    def ping(self) -> None:
        """A line there and its answer: of the first host, which the other one answers."""
        if self.is_first:
            self.tell(0)
        else:
            self._lines.readline(1 << 12)
            self.control.sendall(b"0\n")


def examine(place: str) -> list[Finding]:
    """What this host finds of the one at the other end. Waits for it; raises UserError where `place` is no place."""
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--peer {place}", "it is no HOST:PORT", "as in --peer 10.0.0.1:29500")
    try:
        other = _meet(host, int(port))
        with other.control:
            return list(_findings(other))
    except (OSError, ValueError) as error:
        raise ShoalError(
            f"--peer {place}: the other host has left, or is no shoal doctor ({error})"
        ) from None


def _findings(other: Other) -> Iterator[Finding]:
    with socket.create_server((other.way.address, 0)) as listener:
        listener.settimeout(PATIENCE)
        own = {"host": socket.gethostname(), "at": listener.getsockname()[:2], "way": str(other.way)}
        its = other.tell(own)
        yield Finding("peer", "hosts", f"{own['host']} by {own['way']}, {its['host']} by {its['way']}")
        for outwards in (other.is_first, not other.is_first):  # one direction after the other
            yield _direction(other, its["at"], listener, outwards)
        yield Finding("peer", "latency", f"{_round_trip(other) * 1e3:.2f} ms there and back")


def _direction(other: Other, at: list[Any], listener: socket.socket, outwards: bool) -> Finding:
    """Whether this host reaches the other (`outwards`), or is reached by it, and at what rate."""
    name = "to it" if outwards else "from it"
    end = _connected(at, listener, outwards)
    if not other.tell(end is not None) or end is None:
        remedy = "let no firewall block connections between the two, to any port"
        return Finding("peer", name, f"no connection within {PATIENCE:.0f} s", "fail", remedy)
    with end:
        rate = _send(end) if outwards else _receive(end)
        return Finding("peer", name, f"{max(rate, other.tell(rate)) / 1e6:,.2f} MB/s")


def _meet(host: str, port: int) -> Other:
    """A connection to the other host: this one listens where the address is its own, else it calls."""
    began, said = time.monotonic(), time.monotonic()
    with suppress(OSError), socket.create_server(("" if means_loopback(host) else host, port)) as listener:
        listener.settimeout(1.0)
        while True:
            with suppress(TimeoutError):
                control, (address, *_) = listener.accept()
                return Other(control, _way(address), True)
            said = _word(f"the other host at {host}:{port}", began, said)
    while True:
        try:
            return Other(socket.create_connection((host, port), PATIENCE), _way(host), False)
        except OSError as error:
            said = _word(f"{host}:{port} ({(error.strerror or str(error)).lower()})", began, said)
            time.sleep(0.2)


def _word(whom: str, began: float, said: float) -> float:
    now = time.monotonic()
    if now - said < WORD:
        return said
    output.say(f"shoal: waiting for {whom}, for {now - began:.0f} s")
    return now


def _way(address: str) -> Interface:
    found = towards(address)
    if found is None:
        raise ShoalError(f"--peer: this host has no way to {address}")
    return found


def _connected(at: list[Any], listener: socket.socket, outwards: bool) -> socket.socket | None:
    """A connection in one direction; None where it does not come about."""
    try:
        if outwards:
            return socket.create_connection((at[0], at[1]), PATIENCE)
        return listener.accept()[0]
    except OSError:
        return None


def _send(end: socket.socket) -> float:
    """Send ever more, until it takes long enough. The other end measures; returns 0."""
    size = FIRST
    while size:
        end.settimeout(None)
        end.sendall(size.to_bytes(8, "big") + bytes(size))
        size = _number(end)
    return 0.0


def _receive(end: socket.socket) -> float:
    """The bytes a second of the last message that came; asks for larger ones until one takes ENOUGH."""
    end.settimeout(None)
    while True:
        size = _number(end)
        began = time.perf_counter()
        _exactly(end, min(size, MOST))
        seconds = time.perf_counter() - began
        more = 0 if seconds > ENOUGH or 4 * size > MOST else 4 * size
        end.sendall(more.to_bytes(8, "big"))
        if not more:
            return size / max(seconds, 1e-9)


def _exactly(end: socket.socket, size: int) -> None:
    while size:
        got = len(end.recv(min(size, 1 << 20)))
        if not got:
            raise ConnectionError("a connection was closed")
        size -= got


def _number(end: socket.socket) -> int:
    return int.from_bytes(end.recv(8, socket.MSG_WAITALL), "big")


def _round_trip(other: Other) -> float:
    """The median seconds of a line there and its answer. The first host measures."""
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        other.ping()
        times.append(time.perf_counter() - began)
    own = statistics.median(times) if other.is_first else 0.0
    return max(own, other.tell(own))
