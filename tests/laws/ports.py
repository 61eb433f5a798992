"""Ports for processes that bind them later."""

import random
import socket

LOWEST, HIGHEST = (
    20_000,
    32_000,
)  # below those that the system gives to connections, which could take it meanwhile


def free_port() -> int:
    """A port of loopback at which nothing listens."""
    while True:
        port = random.SystemRandom().randrange(LOWEST, HIGHEST)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
