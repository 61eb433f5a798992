"""Every exchange is listed by name while it is open, counts its bytes once, and names a peer that is gone."""

import os
import queue
import re
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.pool import Pool

from shoal.errors import PeerLost
from shoal.wire import pulse
from shoal.wire.mesh import AXES, MERGED, Mesh
from shoal.wire.pairs import Bell
from shoal.wire.waits import WAITS
from shoal.wire.wire import Wire

ROOT = Path(__file__).parent.parent


def started(wire: Wire, kind: str) -> Any:
    """An exchange of 4 float64 numbers with each rank, under the name "it"."""
    part, whole = torch.ones(4, dtype=torch.float64), torch.ones(4 * wire.world_size, dtype=torch.float64)
    before, after = (wire.rank - 1) % wire.world_size, (wire.rank + 1) % wire.world_size
    if kind == "all-reduce":
        return wire.start_all_reduce(whole, "it")
    if kind == "all-gather":
        return wire.start_all_gather(whole, part, "it")
    if kind == "reduce-scatter":
        return wire.start_reduce_scatter(part, whole, "it")
    if kind == "all-to-all":
        return wire.start_exchange(torch.empty_like(whole), [4] * wire.world_size, whole, "it")
    if kind == "receive":
        return wire.start_receive(part, after, "it")
    if kind == "swap":
        return wire.start_swap([part], [torch.empty_like(part)], after, "it")  # of two ranks
    wire.start_receive(torch.empty_like(part), before)
    return wire.start_send(part, after, "it")


SENT = {  # of part: 32 bytes; between 2 ranks
    "all-reduce": 64, "all-gather": 32, "reduce-scatter": 32, "all-to-all": 32, "swap": 32, "send": 32,
}  # fmt: skip


def life_of(mesh: Mesh, kind: str) -> tuple[list[str], int, list[str], int]:
    wire = mesh.wire("world")
    exchange = started(wire, kind)
    sent = wire.bytes_sent
    others = [each for each in wire.pending if each is not exchange]
    opened = [each.what for each in wire.pending]
    for each in (exchange, *others):
        each.wait()
    exchange.wait()
    return opened, sent, [each.what for each in wire.pending], wire.bytes_sent


@pytest.mark.parametrize("kind", SENT)
def test_an_open_exchange_is_listed_and_counts_once(pool: Pool, kind: str) -> None:
    for opened, sent, left, sent_again in pool.world(2, life_of, kind):
        assert opened == (["receive"] if kind == "send" else []) + ["it"]
        assert left == []
        assert sent == sent_again == SENT[kind]


def wait_for_the_dead(mesh: Mesh, kind: str) -> tuple[Any, ...]:
    wire = mesh.wire("world")
    wire.barrier()
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost) as lost:
        started(wire, kind).wait()
    return lost.value.rank, lost.value.what, isinstance(lost.value, ConnectionError), len(wire.pending)


@pytest.mark.parametrize(("kind", "rank"), [("receive", 1), ("all-reduce", None), ("all-gather", None)])
def test_a_peer_that_is_gone_is_named(pool: Pool, kind: str, rank: int | None) -> None:
    survivor, _ = pool.wait(pool.start(wait_for_the_dead, kind, ranks=2))
    assert not survivor.code, survivor.trace
    assert survivor.value == (rank, "it", True, 0)


def wires_of(mesh: Mesh) -> list[bool]:
    """Of a cut mesh: whether each axis has one wire, and which axes share one with another."""
    cut = mesh.cut({"shard": 2, "tensor": 2})
    names = [name for name in (*AXES, *MERGED) if cut.size(name) > 1]
    wires = [cut.wire(name) for name in names]
    again = [cut.wire(name) for name in names]
    whole = mesh.cut({"replicate": 4})
    neighbours = whole.wire("replicate").neighbours(2)
    neighbours.sum(torch.ones(1))
    return [
        all(a is b for a, b in zip(wires, again, strict=True)),
        len({id(wire) for wire in wires}) == len(names),  # each counts its own bytes
        whole.wire("world") is whole.wire("replicate"),
        cut.wire("world") is not cut.wire("replicate"),
        whole.wire("replicate").bytes_sent == 4,
    ]


def test_an_axis_has_one_wire(pool: Pool) -> None:
    assert pool.world(4, wires_of) == [[True] * 5] * 4


def test_only_the_mesh_makes_wires() -> None:
    made = re.compile(r"(?<![\w.])Wire\(")
    found = [
        str(path.relative_to(ROOT))
        for folder in ("shoal", "tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if any(made.search(line) and "class " not in line for line in path.read_text().splitlines())
    ]
    assert sorted(set(found) - {"tests/test_wire.py"}) == ["shoal/wire/mesh.py", "shoal/wire/wire.py"]


def wait_unnoticed(mesh: Mesh) -> tuple[int | None, str]:
    """What rank 1 hears that waits for rank 0, which dies, and whose transport says nothing."""
    pulse.UNNOTICED = 1.0
    ready = Bell("ready")
    if mesh.rank == 0:
        ready.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    assert mesh.pulse is not None
    heard: queue.Queue[PeerLost] = queue.Queue()
    mesh.pulse.give_up = heard.put
    with WAITS.on("an exchange", (0,)):
        ready.ring()
        lost = heard.get(timeout=30)
    return lost.rank, str(lost)


def test_who_waits_for_the_dead_is_told_where_the_transport_does_not_notice(pool: Pool) -> None:
    _, left = pool.wait(pool.start(wait_unnoticed, ranks=2))
    assert left.value == (0, "an exchange with worker 0: its process has ended"), left


def disturbed(mesh: Mesh) -> tuple[bool, dict[int, str]]:
    """Whether the pulse goes on, and who is gone, after strangers have spoken to it."""
    assert mesh.pulse is not None
    if mesh.rank:
        for said in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b"7\n",
            '{"rank": 0, "proof": "é"}\n'.encode(),
            b"{}\n",
        ):
            with socket.create_connection(tuple(mesh.pulse._at)) as stranger:
                stranger.sendall(said)
                with suppress(ConnectionError):
                    assert stranger.recv(1) == b"", said  # turned away
    mesh.wire("world").barrier()
    return mesh.pulse._thread.is_alive(), mesh.pulse.view.gone


def test_who_sends_nonsense_to_the_pulse_is_turned_away(pool: Pool) -> None:
    assert pool.world(2, disturbed) == [(True, {})] * 2
