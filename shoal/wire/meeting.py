"""How processes meet: the store that rank 0 keeps, waiting for the others, and leaving."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shoal.errors import ShoalError
from shoal.wire.rendezvous import Rendezvous

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for the slowest rank
FOREVER = timedelta(days=365)
JOIN = timedelta(hours=24)  # how long ranks wait for the last one, which may have data to prepare first
WORD = timedelta(minutes=1)  # between two lines that name the missing ranks
LOOK = 0.1  # seconds: the longest pause between two looks
PARTING = 5.0  # seconds that the rank which keeps the store stays for the others, of whom some may have died


def open_store(rendezvous: Rendezvous) -> dist.Store:
    """The key-value store where ranks meet. It listens on the address that was named, and on no other."""
    serves = _serves(rendezvous)
    port, listen_fd = rendezvous.port, rendezvous.store_fd
    if not serves:
        where = f"worker 0 at {rendezvous.address}:{port}"
        _await(lambda: _listens(rendezvous.address, port), rendezvous, lambda: where)
    if serves and listen_fd is None:
        listener = socket.create_server((rendezvous.address, port))
        port, listen_fd = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        rendezvous.address,
        port,
        rendezvous.world_size,
        is_master=serves,
        timeout=JOIN,
        wait_for_workers=False,
        master_listen_fd=listen_fd if serves else None,
    )


def _listens(address: str, port: int) -> bool:
    """Whether the store's place is open. (Torch's own attempts would fill the screen.)"""
    try:
        socket.create_connection((address, port), timeout=WORD.total_seconds()).close()
    except OSError:
        return False
    return True


def meet(store: dist.Store, rendezvous: Rendezvous) -> None:
    """Wait until every rank is here, however long some prepare their data. Raises ShoalError after JOIN."""
    ranks = range(rendezvous.world_size)
    store.set(f"here/{rendezvous.rank}", "")
    if store.add("here", 1) == len(ranks):
        store.set("all here", "")

    def missing() -> str:
        return "worker " + ", ".join(str(rank) for rank in ranks if not store.check([f"here/{rank}"]))

    _await(lambda: store.check(["all here"]), rendezvous, missing)


def part(store: dist.Store, rendezvous: Rendezvous) -> None:
    """Keep the store until the others have left too: they may still have to read what rank 0 wrote last."""
    with suppress(RuntimeError):  # the store is gone: nobody needs to hear of this rank
        store.add("left", 1)
        if not _serves(rendezvous):
            return
        end = time.monotonic() + PARTING
        for _ in looks(lambda: store.add("left", 0) == rendezvous.world_size or time.monotonic() > end):
            pass


def _serves(rendezvous: Rendezvous) -> bool:
    return rendezvous.rank == 0 and not rendezvous.served


def _await(arrived: Callable[[], bool], rendezvous: Rendezvous, awaited: Callable[[], str]) -> None:
    began = said = time.monotonic()
    for _ in looks(arrived):
        now = time.monotonic()
        if now - began > JOIN.total_seconds():
            raise ShoalError(f"{awaited()} did not come within {JOIN}; see what it has printed")
        if now - said > WORD.total_seconds():
            said = now
            if rendezvous.local_rank == 0:  # one of each machine
                waited = timedelta(seconds=round(now - began))
                print(f"shoal: waiting for {awaited()}, since {waited}", file=sys.stderr, flush=True)


def looks(done: Callable[[], bool]) -> Iterator[None]:
    """Look whether it is `done`, ever less often; yields after each look that finds it is not.

    Python handles signals between two looks, and not within a call that waits.
    """
    pause = 0.001
    while not done():
        yield
        time.sleep(pause)
        pause = min(LOOK, 2 * pause)


def own_store() -> dist.Store:
    """A connection of one's own to the store: a thread that waits on a shared one would hold up the others."""
    return shared_store().clone()


def shared_store() -> Any:
    """The connection of this process to the store, for what does not wait."""
    return dist.distributed_c10d._get_default_store()


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    """A process group of these ranks. They alone call it: its name follows from their ranks."""
    return dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)
