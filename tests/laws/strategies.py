"""The table: every strategy, how it is asked for, and which laws it declares. A new one joins by one line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Strategy:
    """The settings that choose a strategy, and the numbers of the laws of the design that it keeps.

    `laws` are asked by `each_that_keeps`, those of its `own` by tests that name it. `exact`: what the laws allow up
    to rounding it keeps to the last bit. `period`: steps until its costs repeat.
    """

    settings: dict[str, Any]
    laws: set[int]
    own: frozenset[int] = frozenset()
    exact: bool = field(default=False)
    period: int = 1


OTHERWISE = frozenset({6})  # of those that train otherwise than one process would
STRATEGIES = {
    # Without the tree the bits depend on the shares, which follow the ranks' speed unless they are kept.
    "allreduce": Strategy({"strategy": "allreduce", "balance": "off"}, {1, 2, 3, 4, 5, 7, 8, 9, 10}),
    "allreduce-exact": Strategy(
        {"strategy": "allreduce", "exact": True}, {1, 2, 3, 4, 5, 7, 8, 9}, exact=True
    ),
    "server": Strategy({"strategy": "server", "balance": "off"}, {1, 3, 4, 7, 8, 10}),
    "server-sharded": Strategy(
        {"strategy": "server", "servers": 2, "share_memory": False, "balance": "off"}, {3, 4, 7, 8}
    ),
    "async": Strategy({"strategy": "async", "balance": "off"}, {1, 8}, OTHERWISE | {10}),
    "local": Strategy(
        {"strategy": "local", "sync_every": 4, "balance": "off"}, {7, 8, 9}, OTHERWISE, period=4
    ),
    "local-slowmo": Strategy(
        {"strategy": "local", "sync_every": 4, "averaging": "slowmo", "balance": "off"}, {7, 8}, OTHERWISE
    ),
    "diloco": Strategy(
        {"strategy": "diloco", "sync_every": 5, "balance": "off"}, {7, 8, 9}, OTHERWISE, period=5
    ),
    "diloco-streaming": Strategy(
        {
            "strategy": "diloco",
            "sync_every": 6,
            "fragments": 3,
            "overlap_steps": 2,
            "mixing": 0.5,
            "balance": "off",
        },
        {7, 8, 9},
        OTHERWISE,
        period=6,
    ),
    "noloco": Strategy({"strategy": "noloco", "sync_every": 5, "balance": "off"}, {7, 8}, OTHERWISE),
    "gossip": Strategy({"strategy": "gossip", "balance": "off"}, {7, 8}, OTHERWISE),
    "gossip-push-sum": Strategy(
        {"strategy": "gossip", "topology": "push-sum", "balance": "off"}, {7, 8}, OTHERWISE
    ),
    "gossip-int8": Strategy(
        {"strategy": "gossip", "topology": "ring", "codec": "int8", "balance": "off"}, {7, 8}, OTHERWISE
    ),
    "demo": Strategy({"strategy": "demo", "balance": "off"}, {7, 8}, OTHERWISE),
}


def asks(law: int, *rows: str) -> Callable[[Any], Any]:
    """Mark a test as one that asks `law` of these rows, where `each_that_keeps` does not fit it."""
    assert all(law in STRATEGIES[row].own for row in rows)
    return lambda test: test


def each_that_keeps(law: int, *, exact: bool | None = None) -> pytest.MarkDecorator:
    """Run a test with the name of every strategy that declares `law`."""
    chosen = [
        name
        for name, strategy in STRATEGIES.items()
        if law in strategy.laws and exact in (None, strategy.exact)
    ]
    return pytest.mark.parametrize("strategy", chosen)
