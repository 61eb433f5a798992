"""How processes meet: the store that rank 0 keeps, waiting for the others, and leaving."""

import errno
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shoal.errors import ShoalError, UserError
from shoal.system import output
from shoal.wire.alike import Difference, differences
from shoal.wire.cards import TOKEN, Card, check_first, own_card, read_card, shows_token
from shoal.wire.hosts import Host, Interface, means_loopback, named, way_to_others
from shoal.wire.rendezvous import Rendezvous
from shoal.wire.waits import WAITS

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for the slowest rank
FOREVER = timedelta(days=365)
JOIN = timedelta(hours=24)  # how long ranks wait for the last one, which may have data to prepare first
ANSWER = timedelta(seconds=30)  # how long the store may take for its first answer
WORD = timedelta(seconds=10)  # between two lines that say who is awaited
ALL_HERE = "all here"
NAMED = 16  # ranks, in a line
LOOK = 0.1  # seconds: the longest pause between two looks
PARTING = 4.0  # seconds that the rank which keeps the store stays for the others, of whom some may have died


@dataclass(frozen=True)
class Met:
    """What a rank knows once all have met: their hosts, by rank, what is not alike, and the way to the others."""

    hosts: list[Host]
    differences: list[Difference]
    way: Interface | None


def open_store(rendezvous: Rendezvous) -> dist.Store:
    """The key-value store where ranks meet. It listens on the address that was named, and on no other.

    Raises UserError where its port is in use, or where something else listens there.
    """
    serves = _serves(rendezvous)
    port, listen_fd = rendezvous.port, rendezvous.store_fd
    if not serves:
        _await_store(rendezvous)
    if serves and listen_fd is None:
        listener = _listen(rendezvous)
        port, listen_fd = listener.getsockname()[1], listener.detach()
    try:
        store = dist.TCPStore(
            rendezvous.address,
            port,
            rendezvous.world_size,
            is_master=serves,
            timeout=ANSWER,
            wait_for_workers=False,
            master_listen_fd=listen_fd if serves else None,
        )
    except RuntimeError as error:
        found = "what listens there is no store of torch, or is out of reach"
        raise UserError(
            _place(rendezvous), found, "give every worker the address and port of worker 0"
        ) from error
    store.set_timeout(JOIN)
    return store


def _listen(rendezvous: Rendezvous) -> socket.socket:
    """The socket of the store, where the address that was named is this machine's."""
    address, port = rendezvous.address, rendezvous.port
    try:
        if means_loopback(address) and rendezvous.local_size != rendezvous.world_size:
            # The host's name, which here alone means loopback: the others come by an address that it has for them.
            return socket.create_server(("", port))
        return socket.create_server((address, port))
    except OSError as error:
        change = {
            errno.EADDRINUSE: "another process has it: give another port to every worker, or end that process",
            errno.EADDRNOTAVAIL: "give every worker an address of the machine of worker 0",
        }
        why = change.get(error.errno or 0, "give every worker another address or port")
        raise UserError(_place(rendezvous), error.strerror or str(error), why) from None


def _await_store(rendezvous: Rendezvous) -> None:
    """Wait until the store's place is open. (Torch's own attempts would fill the screen.)"""
    why = ""

    def listens() -> bool:
        nonlocal why
        try:
            socket.create_connection((rendezvous.address, rendezvous.port), WORD.total_seconds() / 2).close()
        except OSError as error:
            why = error.strerror or str(error)
            return False
        return True

    _await(listens, rendezvous, lambda: f"worker 0 at {rendezvous.address}:{rendezvous.port} ({why.lower()})")


def meet(store: dist.Store, rendezvous: Rendezvous, facts: Mapping[str, str]) -> Met:
    """Wait until every rank is here, however long some prepare their data, and compare their `facts`.

    Rank 0 lets in who shows the run's token, and names who does not. Raises UserError where this rank has come to
    another run, or another process has its rank, and ShoalError after JOIN.
    """
    card = own_card(rendezvous, facts)
    if rendezvous.rank == 0:
        store.set("here/0", card.as_text())
        cards = _let_in(store, rendezvous, card)
        hosts, different = [each.host for each in cards], differences(cards)
        store.set(ALL_HERE, json.dumps([list(map(asdict, hosts)), list(map(asdict, different))]))
        return Met(hosts, different, _way(rendezvous, hosts))
    _await(lambda: store.check(["here/0"]), rendezvous, lambda: f"worker 0 at {_place(rendezvous)}")
    check_first(read_card(store.get("here/0")), rendezvous)
    own = card.as_text()
    there = store.compare_set(f"here/{rendezvous.rank}", "", own).decode()
    if there != own:
        other = read_card(there)
        found = f"another process{f' on {other.host.name}' if other else ''} has this rank"
        change = "give each process a rank of its own, and each run a port of its own"
        raise UserError(f"worker {rendezvous.rank} on {card.host.name}", found, change)
    _await(lambda: store.check([ALL_HERE]), rendezvous, lambda: _missing(store, rendezvous))
    said = json.loads(store.get(ALL_HERE))
    hosts, different = [Host(**each) for each in said[0]], [Difference(**each) for each in said[1]]
    return Met(hosts, different, _way(rendezvous, hosts))


def _way(rendezvous: Rendezvous, hosts: list[Host]) -> Interface | None:
    if rendezvous.interface:
        return named(rendezvous.interface)
    return way_to_others(hosts, rendezvous.rank, rendezvous.address)


def _let_in(store: dist.Store, rendezvous: Rendezvous, first: Card) -> list[Card]:
    """The cards of all ranks, once all are here. Who does not show the token is turned away."""
    cards = {0: first}

    def all_here() -> bool:
        for rank in range(rendezvous.world_size):
            key = f"here/{rank}"
            if rank in cards or not store.check([key]):
                continue
            card = read_card(store.get(key))
            if card is not None and card.rank == rank and shows_token(card, rendezvous):
                cards[rank] = card
                continue
            store.delete_key(key)
            host = card.host.name if card is not None else "an unknown host"
            output.say(f"shoal: turned away: worker {rank} on {host} does not have this run's {TOKEN}")
        return len(cards) == rendezvous.world_size

    _await(all_here, rendezvous, lambda: _missing(store, rendezvous))
    return [cards[rank] for rank in range(rendezvous.world_size)]


def _missing(store: dist.Store, rendezvous: Rendezvous) -> str:
    ranks = range(rendezvous.world_size)
    missing = [str(rank) for rank in ranks if not store.check([f"here/{rank}"])]
    shown = ", ".join(missing[:NAMED]) + (" ..." if len(missing) > NAMED else "")
    return f"{len(missing)} of {len(ranks)} workers (worker {shown}) at {_place(rendezvous)}"


def _place(rendezvous: Rendezvous) -> str:
    return f"{rendezvous.address}:{rendezvous.port}"


def part(store: dist.Store, rendezvous: Rendezvous, gone: Sized = ()) -> None:
    """Keep the store until all others have left, who may have to read what is in it, but those that are `gone`."""
    with suppress(RuntimeError):  # the store is gone: nobody needs to hear of this rank
        store.add("left", 1)
        if not _serves(rendezvous):
            return
        end, everyone = time.monotonic() + PARTING, rendezvous.world_size
        for _ in looks(lambda: store.add("left", 0) >= everyone - len(gone) or time.monotonic() > end):
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
                output.say(f"shoal: waiting for {awaited()}, for {now - began:.0f} s")


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
    with WAITS.on("making a group", tuple(ranks)):
        return dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)
