"""The table: every strategy, how it is asked for, and which laws it declares. A new one joins by one line."""

from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Strategy:
    """The settings that choose a strategy, and the numbers of the laws of the design that it keeps.

    `exact`: what the laws allow up to rounding it keeps to the last bit.
    """

    settings: dict[str, Any]
    laws: set[int]
    exact: bool = field(default=False)


STRATEGIES = {
    # Without the tree the bits depend on the shares, which follow the ranks' speed unless they are kept.
    "allreduce": Strategy({"strategy": "allreduce", "balance": "off"}, {1, 2, 3, 4, 5, 7, 9, 10}),
    "allreduce-exact": Strategy(
        {"strategy": "allreduce", "exact": True}, {1, 2, 3, 4, 5, 7, 9, 10}, exact=True
    ),
}


def each_that_keeps(law: int, *, exact: bool | None = None) -> pytest.MarkDecorator:
    """Run a test with the name of every strategy that declares `law`."""
    chosen = [
        name
        for name, strategy in STRATEGIES.items()
        if law in strategy.laws and exact in (None, strategy.exact)
    ]
    return pytest.mark.parametrize("strategy", chosen)
