"""A worker's way to one server: in its own process, or over a line to another."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.servers.connections import Line
from shoal.servers.core import Halted
from shoal.servers.host import NOTHING, Host
from shoal.servers.messages import PULLS, PUSHES, Kind, Reply, Request
from shoal.servers.parcels import Parcels
from shoal.wire.pairs import Work


class Link(ABC):
    """Asks one server, one thing at a time: `ask`, then `answer`.

    For a push `gradient` [n] is filled before; after a pull `parameters` [n] holds what came.
    """

    bytes_sent = 0

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """Where a gradient goes before it is pushed."""

    @property
    @abstractmethod
    def parameters(self) -> Tensor:
        """What was pulled last."""

    @abstractmethod
    def ask(self, request: Request, told: Tensor = NOTHING) -> None:
        """Begin to ask."""

    @abstractmethod
    def answer(self) -> tuple[Reply, Tensor]:
        """Wait for the reply, and what the other workers told. Raises Halted when nothing can go on."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """A copy of the state of the server's optimizers, by parameter and part."""

    @abstractmethod
    def leave(self) -> None:
        """Part from the server."""


class Local(Link):
    """To the server in this process."""

    def __init__(self, host: Host, worker: int, parcels: Parcels) -> None:
        self._host = host
        self._worker = worker
        self._parcels = parcels
        self._payload = torch.zeros(parcels.nbytes, dtype=torch.uint8)
        self._gradient = parcels.buffer(self._payload)
        self._parameters = torch.zeros_like(host.server.flat)
        self._request: Request
        host.server.join(worker)

    @property
    def gradient(self) -> Tensor:
        """As every link."""
        return self._gradient

    @property
    def parameters(self) -> Tensor:
        """As every link."""
        return self._parameters

    def ask(self, request: Request, told: Tensor = NOTHING) -> None:
        """As every link."""
        self._request = request
        gradient = None
        if request.kind in PUSHES:
            self._parcels.wrap(self._gradient, self._payload)
            gradient = self._host.parcels.unwrap(self._payload)
        if request.kind in (*PUSHES, Kind.SKIP):
            self._host.push(request, gradient, told)

    def answer(self) -> tuple[Reply, Tensor]:
        """As every link."""
        if self._request.kind in PULLS:
            return self._host.pull(self._request, self._parameters)
        return self._host.pushed(self._request)

    def state(self) -> dict[str, Tensor]:
        """As every link."""
        return self._host.state()

    def leave(self) -> None:
        """As every link."""
        self._host.leave(self._worker)


class Remote(Link):
    """To a server in another process. A line that breaks is made again once, and what was asked is asked again."""

    AGAIN = timedelta(seconds=10)  # how long a server may take to let a worker in again

    def __init__(self, connect: Callable[..., Line], server: str, parcels: Parcels) -> None:
        self._connect = connect
        self._server = server
        self._parcels = parcels
        self._line = connect()
        self._gradient = parcels.buffer(self._line.outgoing)
        self._sent_before = 0
        self._asked: tuple[Request, Tensor]
        self._works: list[Work] = []

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        """Of gradients so far."""
        return self._sent_before + self._line.bytes_sent

    @property
    def gradient(self) -> Tensor:
        """As every link."""
        return self._gradient

    @property
    def parameters(self) -> Tensor:
        """As every link."""
        return self._line.incoming.view(self._parcels.dtype)

    def ask(self, request: Request, told: Tensor = NOTHING) -> None:
        """As every link."""
        self._asked = (request, told)
        if request.kind in PUSHES:
            self._parcels.wrap(self._gradient, self._line.outgoing)
        try:
            self._send()
        except PeerLost:
            self._works = []  # shows again in `answer`, which makes a new line

    def answer(self) -> tuple[Reply, Tensor]:
        """As every link."""
        try:
            return self._receive()
        except PeerLost as error:
            try:
                self._reconnect()
                self._send()
                return self._receive()
            except PeerLost:
                raise Halted(f"{self._server} is gone: {error.how}") from error

    def state(self) -> dict[str, Tensor]:
        """As every link."""
        self._line.finish(self._line.send(Request(Kind.STATE, 0).pack()))
        reply = Reply.unpack(self._line.receive_header())
        return self._line.receive_tensors(self._line.receive_text(reply.text))

    def leave(self) -> None:
        """As every link."""
        with suppress(PeerLost):  # it has left before us
            self._line.finish(self._line.send(Request(Kind.LEAVE, 0).pack()))

    def _send(self) -> None:
        request, told = self._asked
        if request.kind in PULLS:
            self._line.expect_payload()
        self._works = self._line.send(request.pack(), told, payload=request.kind in PUSHES)

    def _receive(self) -> tuple[Reply, Tensor]:
        while (reply := Reply.unpack(self._line.receive_header())).waits:
            pass  # Python handles signals between two replies
        self._line.finish(self._works)
        if reply.text < 0:
            raise Halted(self._line.receive_text(-reply.text))
        told = self._line.receive_told(reply.told)
        if self._asked[0].kind in PULLS:
            self._line.receive_payload()
        return reply, told

    def _reconnect(self) -> None:
        payload = self._line.outgoing
        self._sent_before += self._line.bytes_sent
        self._line = self._connect(patience=self.AGAIN)
        self._line.outgoing.copy_(payload)
        self._gradient = self._parcels.buffer(self._line.outgoing)
