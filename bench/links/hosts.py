"""Hosts on this machine: network namespaces around a bridge, each link shaped by a token bucket.

Nothing of it exists in the machine's own network: interfaces are made inside the namespaces, and no packet of
theirs can leave them.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

INTERFACE = "eth0"
PREFIX = "shoal-links"
BURST_SECONDS = 0.004  # of the rate may pass at once: far below any exchange that is measured
SMALLEST_BURST = 5 * 1514  # bytes; a bucket that does not hold a frame passes none
QUEUE = "400ms"  # how long a packet may wait in a full link before it is dropped


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, `INTERFACE`, at `address`."""

    namespace: str
    address: str


@contextmanager
def network(count: int, mbit: float | None) -> Iterator[list[Host]]:
    """`count` hosts on one switch; each link carries `mbit` megabits a second either way, None = all it can.

    At the end, however it comes, all processes in the namespaces are killed, and the namespaces are removed,
    with their interfaces and queues. Raises RuntimeError with the words of `ip` or `tc` where one refuses.
    """
    _remove(_left_behind())
    names = [f"{PREFIX}-{os.getpid()}-{i}" for i in range(count)]
    switch = f"{PREFIX}-{os.getpid()}-switch"
    try:
        _make_switch(switch)
        hosts = [Host(name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]
        for port, host in enumerate(hosts):
            _plug_in(host, switch, f"port{port}", mbit)
        yield hosts
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
        _remove([*names, switch])
        signal.signal(signal.SIGINT, interrupt)


def set_link(host: Host, *, up: bool) -> None:
    """Pull the host's cable out of the switch, or plug it in again."""
    switch = host.namespace.rpartition("-")[0] + "-switch"
    port = "port" + host.namespace.rpartition("-")[2]
    _run("ip", "-n", switch, "link", "set", port, "up" if up else "down")


def bytes_moved(pid: int) -> int:
    """What the host of process `pid` has sent or received so far, whichever is more, headers included.

    Raises OSError if there is no such process any more.
    """
    with open(f"/proc/{pid}/net/dev") as table:
        line = next(line for line in table if line.strip().startswith(INTERFACE))
    fields = line.partition(":")[2].split()
    return max(int(fields[0]), int(fields[8]))


def _make_switch(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", name, "link", "set", "bridge", "up")


def _plug_in(host: Host, switch: str, port: str, mbit: float | None) -> None:
    """A cable from the host to the switch. The bucket at either end shapes what that end sends."""
    name = host.namespace
    _run("ip", "netns", "add", name)
    ends = [INTERFACE, "netns", name, "type", "veth", "peer", "name", port, "netns", switch]
    _run("ip", "link", "add", *ends)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        _run("ip", "-n", name, "link", "set", interface, "up")
    if mbit is not None:
        for namespace, interface in ((name, INTERFACE), (switch, port)):
            _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *_bucket(mbit))


def _bucket(mbit: float) -> list[str]:
    burst = max(SMALLEST_BURST, round(mbit * 1e6 / 8 * BURST_SECONDS))
    return ["rate", f"{round(mbit * 1e6)}bit", "burst", str(burst), "latency", QUEUE]


def _left_behind() -> list[str]:
    """Namespaces of a benchmark that was killed before it could remove them."""
    mine = [name for name in _namespaces() if name.startswith(f"{PREFIX}-")]
    return [name for name in mine if not os.path.exists(f"/proc/{name.split('-')[2]}")]


def _remove(names: list[str]) -> None:
    for name in set(names) & set(_namespaces()):
        while pids := _run("ip", "netns", "pids", name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        _run("ip", "netns", "delete", name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
