"""Which machine a rank is on, and by which network interface it reaches the others. Without torch."""

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

# Who takes an interface from the environment. NCCL reads a name as a prefix unless "=" stands before it.
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


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


def this_host(store_address: str, port: int) -> Host:
    """The machine of this process, by the interface that reaches the store."""
    way = towards(store_address, port or 9)
    reached = way.address if way is not None and not way.is_loopback else ""
    return Host(socket.gethostname(), machine_id() or socket.gethostname(), reached)


def way_to_others(hosts: Sequence[Host], rank: int, store_address: str) -> Interface | None:
    """The interface by which this rank reaches those of other machines; where there is one machine, the store.

    One that the environment names for gloo is taken as it is.
    A host's own name often means its loopback (Debian's 127.0.1.1), and rank 0 is asked for by that name: it takes
    the interface that reaches the first rank elsewhere.
    """
    if named := os.environ.get(GLOO, "").partition(",")[0]:
        own = [each.address for each in psutil.net_if_addrs().get(named, []) if each.family == socket.AF_INET]
        return Interface(named, own[0]) if own else None
    others = [each.address for each in hosts if each.machine != hosts[rank].machine]
    if not others:
        return towards(store_address)
    return next(filter(None, map(towards, filter(None, others))), None)


@contextmanager
def bound_to(interface: Interface | None) -> Iterator[None]:
    """Within it gloo and NCCL use this interface, unless the environment names another."""
    given = {} if interface is None else {GLOO: interface.name, NCCL: f"={interface.name}"}
    given = {name: value for name, value in given.items() if name not in os.environ}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


def _interface_at(address: str) -> Interface | None:
    own = psutil.net_if_addrs()
    if ip_address(address.partition("%")[0]).is_loopback:  # any of 127.0.0.0/8 is on it, named or not
        names = [name for name, each in own.items() if any(a.address in ("127.0.0.1", "::1") for a in each)]
        return Interface(names[0], address) if names else None
    names = [name for name, each in own.items() if any(a.address == address for a in each)]
    return Interface(names[0], address) if names else None
