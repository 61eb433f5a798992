"""What the link between workers can do: an all-reduce between two processes on this machine, timed."""

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from shoal.engines.environment import INTERFACES, check_interfaces
from shoal.engines.local import check_loopback
from shoal.errors import ShoalError
from shoal.system import helpers

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.wire.wire import Wire


PAYLOAD_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Link:
    """`latency` of the smallest all-reduce in seconds, `bandwidth` of a large one in bytes a second."""

    latency: float
    bandwidth: float


def measure_link(environ: Mapping[str, str], timeout: float = 60) -> Link:
    """Time an all-reduce between two workers on loopback; lasts as long as importing torch in both.

    Raises UserError where there is no loopback or no such interface, and ShoalError, with the last line that a
    worker left, if they do not end well within `timeout` seconds.
    """
    check_loopback()
    check_interfaces(environ.get(INTERFACES, ""))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, store = listener.getsockname()[1], listener.fileno()
        workers = [
            subprocess.Popen(
                helpers.command("shoal.diagnose.link_probe", str(rank), str(port), str(store)),
                env={**environ, **helpers.imports(), "OMP_NUM_THREADS": "1"},
                pass_fds=[store],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    try:
        with suppress(subprocess.TimeoutExpired):
            for worker in workers:
                worker.wait(timeout)
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    outputs = [worker.communicate() for worker in workers]
    for code, (_, complaint) in zip(codes, outputs, strict=True):
        if code:
            raise ShoalError((complaint.strip().splitlines() or [f"a worker ended with {code}"])[-1])
    if None in codes:
        raise ShoalError(f"two workers did not come to an end within {timeout:.0f} s")
    return Link(**json.loads(outputs[0][0]))


def _work(rank: int, port: int, store: int) -> None:
    """One of the two workers; rank 0 prints what it measured."""
    import torch

    from shoal.wire.mesh import join
    from shoal.wire.rendezvous import Rendezvous

    # On the cores, where two workers can meet on every machine.
    place = Rendezvous(rank, 2, rank, port=port, store_fd=store if rank == 0 else None)
    with join(place, "cpu") as mesh:
        wire = mesh.wire("world")
        latency = _seconds(wire, torch.zeros(1), repeats=50)
        bandwidth = PAYLOAD_BYTES / _seconds(wire, torch.zeros(PAYLOAD_BYTES // 4), repeats=5)
    if rank == 0:
        print(json.dumps(asdict(Link(latency, bandwidth))))


def _seconds(wire: "Wire", tensor: "Tensor", repeats: int) -> float:
    """The median time of an all-reduce of `tensor`, after one to warm up."""
    wire.sum(tensor)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        wire.sum(tensor)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    _work(*map(int, sys.argv[1:]))
