"""Unequal machines: which share of a step's micro-batches each team of ranks takes, by its measured speed."""

from shoal.errors import UserError
from shoal.replica import Shares


def equal(micro_batches: int, teams: int) -> Shares:
    """As even as can be; the first teams take the remainder."""
    each, more = divmod(micro_batches, teams)
    return Shares([each + (team < more) for team in range(teams)])


def fixed(text: str, micro_batches: int, teams: int) -> Shares:
    """Shares as the user gave them, for example "3,1"; raises UserError if they do not fit."""
    counts = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(counts) != teams or sum(counts) != micro_batches or min(counts) < 1:
        raise UserError(
            f"--balance {text}",
            f"{teams} workers share {micro_batches} micro-batches a step",
            f"give {teams} positive numbers that add up to {micro_batches}, for example "
            + ",".join(map(str, equal(micro_batches, teams).counts)),
        )
    return Shares(counts)


def proportional(micro_batches: int, seconds: list[float]) -> Shares:
    """The shares that finish first, for ranks that need `seconds` for one micro-batch: at least one each.

    Each further micro-batch goes to the rank that would be done with it soonest.
    """
    counts = [1] * len(seconds)
    for _ in range(micro_batches - len(seconds)):
        soonest = min(range(len(seconds)), key=lambda r: ((counts[r] + 1) * seconds[r], r))
        counts[soonest] += 1
    return Shares(counts)
