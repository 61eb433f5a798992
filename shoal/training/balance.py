"""Unequal machines: shares of the micro-batches that follow measured speeds."""

from statistics import median

from shoal.replica import Shares
from shoal.shares import proportional

WINDOW = 8  # steps measured before the shares are looked at again
WORTH = (
    0.85  # of the slowest rank's time: shares that save less are not worth a change, since times are noisy
)


class Balancer:
    """Watches how long each rank computes, and changes the shares when others would be faster. May be `off`."""

    def __init__(self, *, off: bool = False) -> None:
        self.off = off
        self.measured: list[list[float]] = []

    def observe(self, shares: Shares, seconds: list[float]) -> Shares:
        """The shares for the next step, from every rank's `seconds` in this one. All ranks get the same."""
        if self.off:
            return shares
        self.measured.append([s / count for s, count in zip(seconds, shares.counts, strict=True)])
        if len(self.measured) < WINDOW:
            return shares
        each = [median(column) for column in zip(*self.measured, strict=True)]
        self.measured.clear()
        better = proportional(sum(shares.counts), each)
        return better if _slowest(better, each) < WORTH * _slowest(shares, each) else shares


def _slowest(shares: Shares, seconds: list[float]) -> float:
    return max(count * s for count, s in zip(shares.counts, seconds, strict=True))
