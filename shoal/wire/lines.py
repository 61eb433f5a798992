"""Messages between two processes, one a line of JSON, on a connection that never blocks."""

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

MOST = 1 << 16  # bytes that wait to be sent, of a message, and that are read at once


class Line:
    """A connection on which messages travel, one a line. Nothing on it ever blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.rank: int | None = None  # of the other end, once it is known
        self._read, self._unsent = b"", b""

    def fileno(self) -> int:
        """For `select`."""
        return self.socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, or what of it the connection takes. Raises OSError where it is broken."""
        if len(self._unsent) < MOST:  # else the other side has read nothing for long, and needs no more of it
            self._unsent += json.dumps(message).encode() + b"\n"
        with suppress(BlockingIOError):
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises OSError where the connection has ended or carries something else."""
        with suppress(BlockingIOError):
            data = self.socket.recv(MOST)
            if not data:
                raise ConnectionError("it was closed")
            self._read += data
            *lines, self._read = self._read.split(b"\n")
        if len(self._read) > MOST:
            raise ConnectionError("it carries no lines")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            raise ConnectionError("it carries no messages") from None
