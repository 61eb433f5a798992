"""What all ranks must have alike is compared when they meet."""

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.wire.cards import Card


@dataclass(frozen=True)
class Difference:
    """A fact that a rank has otherwise than rank 0, with the values and hosts of both."""

    name: str
    rank: int
    value: str
    host: str
    first_value: str
    first_host: str

    def __str__(self) -> str:
        return (
            f"worker {self.rank} on {self.host} has {self.value or 'none'}, "
            f"worker 0 on {self.first_host} has {self.first_value or 'none'}"
        )


def differences(cards: Iterable[Card]) -> list[Difference]:
    """Each fact that is not the same on all, once: of the lowest rank that has it otherwise than rank 0."""
    first, *others = cards
    found: dict[str, Difference] = {}
    for card in others:
        for name in dict.fromkeys([*first.facts, *card.facts]):
            own, its = first.facts.get(name, ""), card.facts.get(name, "")
            if own != its and name not in found:
                found[name] = Difference(name, card.rank, its, card.host.name, own, first.host.name)
    return list(found.values())
