"""Several hosts on this machine, for the pool's processes: network namespaces, each with a host name of its own."""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.links import hosts

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 1 << 14, 1 << 18
PORT = 29500
LIBC = ctypes.CDLL(None, use_errno=True)
Host = hosts.Host
set_link = hosts.set_link


@contextmanager
def network(count: int = 2, mbit: float | None = None) -> Iterator[list[Host]]:
    """`count` hosts on a switch; skips the test where this machine makes none."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("hosts need root, and Debian's iproute2")
    try:
        made = hosts.network(count, mbit)
        found = made.__enter__()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    try:
        yield found
    finally:
        made.__exit__(None, None, None)


def name_of(number: int) -> str:
    return f"host{number}"


def shoal_on(
    everyone: list[Host],
    number: int,
    names: str,
    words: list[str],
    environ: dict[str, str],
    patches: dict[str, Any],
) -> None:
    """The command line as rank `number`, alone on its host; `names` is what /etc/hosts says there. In the pool."""
    from shoal import cli
    from shoal.engines.environment import is_worker
    from shoal.engines.worker import leave

    move_to(everyone[number], name_of(number), names)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": str(len(everyone)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": everyone[0].address, "MASTER_PORT": str(PORT), "SHOAL_DEVICE": "cpu", **environ,
    }  # fmt: skip
    for place, value in patches.items():
        module, _, attribute = place.rpartition(".")
        __import__(module)
        setattr(sys.modules[module], attribute, value)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = cli.main(words)
    sys.stdout.flush()
    if is_worker() and code:
        leave(code)
    sys.exit(code)


def move_to(host: Host, name: str, names: str) -> None:
    """Have this process be on `host`, which is called `name` there."""
    with open(f"/var/run/netns/{host.namespace}") as namespace:
        _call("setns", namespace.fileno(), CLONE_NEWNET)
    _call("unshare", CLONE_NEWUTS | CLONE_NEWNS)
    _call("sethostname", name.encode(), len(name))
    file = Path(f"/tmp/{host.namespace}-hosts")
    file.write_text(f"127.0.0.1 localhost\n{names}\n")
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", str(file).encode(), b"/etc/hosts", None, MS_BIND, None)
    file.unlink()


def _call(name: str, *args: Any) -> None:
    if getattr(LIBC, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
