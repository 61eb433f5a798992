"""Which machine a rank is on, and by which network interface it reaches the others. Without torch."""

import hashlib
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Interface:
    """A network interface, and this machine's address on it."""

    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine is behind it."""
        return ip_address(self.address.partition("%")[0]).is_loopback


@dataclass(frozen=True)
class Host:
    """The machine of a rank: its name, what tells it from others of that name, and its address for the others.

    The address is empty where the rank knows none by which others reach it.
    """

    name: str
    machine: str
    address: str


def machine_id() -> str:
    """A name that two processes share only where they run on one machine and in one network; empty: not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256((boot + os.readlink("/proc/self/ns/net")).encode()).hexdigest()
    except OSError:
        return ""


def towards(address: str, port: int = 9) -> Interface | None:
    """The interface by which this machine's packets leave for `address`; None where there is no way.

    Nothing is sent: a datagram socket that is connected has only asked for the way.
    """
    with suppress(OSError):
        for family, kind, *_, place in socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as asking:
                asking.connect(place)
                return _interface_at(asking.getsockname()[0])
    return None


def means_loopback(address: str) -> bool:
    """Whether a host's name, and not an address or `localhost`, means this machine's loopback."""
    if address == "localhost" or address.replace(".", "").isdecimal() or ":" in address:
        return False
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False


def this_host(store_address: str, port: int) -> Host:
    """The machine of this process, by the interface that reaches the store."""
    way = towards(store_address, port or 9)
    reached = way.address if way is not None and not way.is_loopback else ""
    return Host(socket.gethostname(), machine_id() or socket.gethostname(), reached)


def named(interface: str) -> Interface | None:
    """The interface of this name, by its first IPv4 address; None where it has none."""
    own = [each.address for each in psutil.net_if_addrs().get(interface, []) if each.family == socket.AF_INET]
    return Interface(interface, own[0]) if own else None


def way_to_others(hosts: Sequence[Host], rank: int, store_address: str) -> Interface | None:
    """The interface by which this rank reaches those of other machines; where there is one machine, the store.

    A host's own name often means its loopback (Debian's 127.0.1.1), and rank 0 is asked for by that name: it takes
    the interface that reaches the first rank elsewhere.
    """
    others = [each.address for each in hosts if each.machine != hosts[rank].machine]
    if not others:
        return towards(store_address)
    return next(filter(None, map(towards, filter(None, others))), None)


def _interface_at(address: str) -> Interface | None:
    own = psutil.net_if_addrs()
    if ip_address(address.partition("%")[0]).is_loopback:  # any of 127.0.0.0/8 is on it, named or not
        names = [name for name, each in own.items() if any(a.address in ("127.0.0.1", "::1") for a in each)]
        return Interface(names[0], address) if names else None
    names = [name for name, each in own.items() if any(a.address == address for a in each)]
    return Interface(names[0], address) if names else None
