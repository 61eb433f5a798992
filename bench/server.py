"""Push and pull of 4 MB at a parameter server, against gloo exchanging the same bytes."""

import json
import os
import subprocess
import sys
from statistics import median

from bench.jobs import free_port


def seconds() -> dict[str, float]:
    """The median seconds for each of `bench.server_ends.WAYS`, all taken in turn by the same two processes."""
    port = str(free_port())
    command = [sys.executable, "-m", "bench.server_ends"]
    loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    server, worker = (
        subprocess.Popen([*command, end, port], stdout=subprocess.PIPE, env=loopback)
        for end in ("server", "worker")
    )
    try:
        said, _ = worker.communicate()
    finally:
        for process in (server, worker):
            process.kill()
            process.wait()
    times: dict[str, list[float]] = json.loads(said)
    return {way: median(each) for way, each in times.items()}
