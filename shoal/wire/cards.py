"""What a rank shows when it comes to the meeting: who it is, and that it has the run's token."""

import hashlib
import hmac
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from shoal import __version__
from shoal.errors import UserError
from shoal.wire.hosts import Host, this_host
from shoal.wire.rendezvous import Rendezvous

TOKEN = "SHOAL_TOKEN"


@dataclass(frozen=True)
class Card:
    """A rank, the world that it expects, and what must be alike on all ranks (`facts`, text by name)."""

    rank: int
    world_size: int
    host: Host
    process: int
    facts: Mapping[str, str]
    proof: str

    def as_text(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))


def own_card(rendezvous: Rendezvous, facts: Mapping[str, str]) -> Card:
    """The card of this process."""
    host = this_host(rendezvous.address, rendezvous.port)
    about = {"shoal's version": __version__, **facts}
    proof = _proof(rendezvous.token, rendezvous.rank)
    return Card(rendezvous.rank, rendezvous.world_size, host, os.getpid(), about, proof)


def read_card(text: str | bytes) -> Card | None:
    """The card that a rank has laid down; None where it is none."""
    try:
        said = json.loads(text)
        said["host"] = Host(**said["host"])
        return Card(**said)
    except (ValueError, TypeError, KeyError):
        return None


def shows_token(card: Card, rendezvous: Rendezvous) -> bool:
    """Whether who made the card has the token of this process."""
    return hmac.compare_digest(card.proof, _proof(rendezvous.token, card.rank))


def check_first(card: Card | None, rendezvous: Rendezvous) -> None:
    """Raise UserError where what keeps the meeting is not worker 0 of this run."""
    where = f"worker 0 at {rendezvous.address}:{rendezvous.port}"
    own = f"worker {rendezvous.rank} on {socket.gethostname()}"
    if card is None:
        raise UserError(where, "it is no worker of this shoal", "give another MASTER_PORT to every worker")
    if not shows_token(card, rendezvous):
        found = f"it is on {card.host.name}, and has another {TOKEN} than {own}"
        raise UserError(where, found, f"give the workers of a run one {TOKEN}, and each run its own port")
    if card.world_size != rendezvous.world_size:
        found = f"it expects {card.world_size} workers, {own} expects {rendezvous.world_size}"
        raise UserError(where, found, "give every host the same number of hosts and of workers")


def _proof(token: str, rank: int) -> str:
    return hmac.new(token.encode(), f"worker {rank}".encode(), hashlib.sha256).hexdigest()
