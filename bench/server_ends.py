"""The two processes of `bench.server`: `python -m bench.server_ends server|worker PORT`.

A push is a gradient that the server applies (SGD) before it answers; a pull brings the parameters back.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from shoal.servers.connections import Connection, connect
from shoal.servers.core import ParameterServer
from shoal.servers.host import Host
from shoal.servers.messages import Kind, Request
from shoal.servers.push_format import PushFormat
from shoal.servers.stubs import RemoteStub
from shoal.servers.update_rules import Arrivals
from shoal.wire.mesh import join
from shoal.wire.pairs import Visitor
from shoal.wire.rendezvous import Rendezvous

NUMEL = 1_000_000
PARCELS = PushFormat.plain(NUMEL, torch.float32)  # 4 MB
WARM_UP, TIMED = 10, 60  # rounds, in which each way has one turn
RAW = "raw"
SERVERS = {"shared memory": True, "network": False}  # how tensors travel
WAYS = (RAW, *SERVERS)


def serve() -> None:
    """Answer for ever: the servers from threads of their own, the raw exchange from this one."""
    params = [("p", torch.nn.Parameter(torch.zeros(NUMEL)))]
    for door, share_memory in SERVERS.items():
        server = ParameterServer(params, _sgd, Arrivals(lambda step: 1e-3))
        host = Host(server, PARCELS, print)
        host.open(door, share_memory=share_memory)
        host.begin(params, [1], 0)
    tensor = torch.zeros(NUMEL)
    for _ in range(WARM_UP + TIMED):
        dist.recv(tensor, 1)
        dist.send(tensor, 1)
    threading.Event().wait()


def work() -> dict[str, list[float]]:
    """The seconds of every round after the warm-up, each way in its turn."""
    visitor = Visitor(1)
    exchanges: dict[str, Callable[[int], None]] = {RAW: partial(_swap, torch.zeros(NUMEL))}
    for door in SERVERS:
        stub = RemoteStub(partial(_connect, visitor, door), "the server", PARCELS)
        stub.gradient.fill_(1e-6)
        exchanges[door] = partial(_push_and_pull, stub)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(WARM_UP + TIMED):
        for way in WAYS:
            began = time.perf_counter()
            exchanges[way](step)
            times[way].append(time.perf_counter() - began)
    return {way: each[WARM_UP:] for way, each in times.items()}


def _swap(tensor: torch.Tensor, step: int) -> None:
    dist.send(tensor, 0)
    dist.recv(tensor, 0)


def _push_and_pull(stub: RemoteStub, step: int) -> None:
    stub.ask(Request(Kind.EXCHANGE, 1, step, needed=step + 1, version=step, labels=1, step_labels=1))
    stub.answer()


def _connect(visitor: Visitor, door: str, **knocking: timedelta) -> Connection:
    return connect(visitor.knock(door, **knocking), PARCELS.nbytes, PARCELS.nbytes)


def _sgd(params: list[tuple[str, torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p for _, p in params])]


def main() -> None:
    """Be one end."""
    end, port = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    with join(Rendezvous(("server", "worker").index(end), 2, 0, "127.0.0.1", port)):
        if end == "server":
            serve()
        print(json.dumps(work()), flush=True)


if __name__ == "__main__":
    main()
