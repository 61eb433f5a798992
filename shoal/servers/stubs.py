"""How a worker calls one server: in its own process, or over a connection to another."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor

from shoal.errors import PeerLost
from shoal.servers.connections import Connection
from shoal.servers.core import Halted
from shoal.servers.host import NOTHING, Host
from shoal.servers.messages import PULLS, PUSHES, Kind, Reply, Request
from shoal.servers.push_format import PushFormat
from shoal.wire.pairs import Work


class ServerStub(ABC):
    """Asks one server, one thing at a time: `ask`, then `answer`.

    Fill `gradient` before a push; read `parameters` after a pull.
    """

    bytes_sent = 0

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """The buffer [n] of the gradient that is pushed."""

    @property
    @abstractmethod
    def parameters(self) -> Tensor:
        """The parameters [n] that were pulled last."""

    @abstractmethod
    def ask(self, request: Request, numbers: Tensor = NOTHING) -> None:
        """Send the request, with `numbers` for the other workers."""

    @abstractmethod
    def answer(self) -> tuple[Reply, Tensor]:
        """Wait for the reply and the sum of the other workers' numbers. Raises Halted when nobody can go on."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """A copy of the state of the server's optimizers, by parameter and part."""

    @abstractmethod
    def leave(self) -> None:
        """Leave the server."""


class LocalStub(ServerStub):
    """Calls the server of this process."""

    def __init__(self, host: Host, worker: int, push_format: PushFormat) -> None:
        self._host = host
        self._worker = worker
        self._push_format = push_format
        self._payload = torch.zeros(push_format.nbytes, dtype=torch.uint8)
        self._gradient = push_format.buffer(self._payload)
        self._parameters = torch.zeros_like(host.server.flat)
        self._request: Request
        host.server.join(worker)

    @property
    def gradient(self) -> Tensor:
        return self._gradient

    @property
    def parameters(self) -> Tensor:
        return self._parameters

    def ask(self, request: Request, numbers: Tensor = NOTHING) -> None:
        self._request = request
        gradient = None
        if request.kind in PUSHES:
            self._push_format.wrap(self._gradient, self._payload)
            gradient = self._host.push_format.unwrap(self._payload)
        if request.kind in (*PUSHES, Kind.SKIP):
            self._host.push(request, gradient, numbers)

    def answer(self) -> tuple[Reply, Tensor]:
        if self._request.kind in PULLS:
            return self._host.pull(self._request, self._parameters)
        return self._host.pushed(self._request)

    def state(self) -> dict[str, Tensor]:
        return self._host.state()

    def leave(self) -> None:
        self._host.leave(self._worker)


class RemoteStub(ServerStub):
    """Calls a server of another process. If the connection breaks, it connects again once and repeats the request."""

    RECONNECT = timedelta(seconds=10)  # how long a server may take to accept a worker again

    def __init__(self, connect: Callable[..., Connection], server: str, push_format: PushFormat) -> None:
        self._connect = connect
        self._server = server
        self._push_format = push_format
        self._connection = connect()
        self._gradient = push_format.buffer(self._connection.outgoing)
        self._sent_before = 0
        self._asked: tuple[Request, Tensor]
        self._works: list[Work] = []

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._sent_before + self._connection.bytes_sent

    @property
    def gradient(self) -> Tensor:
        return self._gradient

    @property
    def parameters(self) -> Tensor:
        return self._connection.incoming.view(self._push_format.dtype)

    def ask(self, request: Request, numbers: Tensor = NOTHING) -> None:
        self._asked = (request, numbers)
        if request.kind in PUSHES:
            self._push_format.wrap(self._gradient, self._connection.outgoing)
        try:
            self._send()
        except PeerLost:
            self._works = []  # `answer` fails too, and connects again

    def answer(self) -> tuple[Reply, Tensor]:
        try:
            return self._receive()
        except Halted:
            raise
        except PeerLost as error:
            try:
                self._reconnect()
                self._send()
                return self._receive()
            except PeerLost:
                raise Halted(f"{self._server} is gone: {error.how}") from error

    def state(self) -> dict[str, Tensor]:
        self._connection.finish(self._connection.send(Request(Kind.STATE, 0).pack()))
        reply = Reply.unpack(self._connection.receive_header())
        return self._connection.receive_tensors(self._connection.receive_text(reply.text))

    def leave(self) -> None:
        with suppress(PeerLost):  # it has left before us
            self._connection.finish(self._connection.send(Request(Kind.LEAVE, 0).pack()))

    def _send(self) -> None:
        request, numbers = self._asked
        if request.kind in PULLS:
            self._connection.expect_payload()
        self._works = self._connection.send(request.pack(), numbers, payload=request.kind in PUSHES)

    def _receive(self) -> tuple[Reply, Tensor]:
        while (reply := Reply.unpack(self._connection.receive_header())).waits:
            pass  # Python handles signals between two replies
        self._connection.finish(self._works)
        if reply.text < 0:
            raise Halted(self._connection.receive_text(-reply.text))
        numbers = self._connection.receive_numbers(reply.numbers)
        if self._asked[0].kind in PULLS:
            self._connection.receive_payload()
        return reply, numbers

    def _reconnect(self) -> None:
        payload = self._connection.outgoing
        self._sent_before += self._connection.bytes_sent
        self._connection = self._connect(patience=self.RECONNECT)
        self._connection.outgoing.copy_(payload)
        self._gradient = self._push_format.buffer(self._connection.outgoing)
