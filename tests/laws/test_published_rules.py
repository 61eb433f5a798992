"""Law 6: every strategy that is not exact equals its published rule, simulated in one process in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from laws import published
from laws.pool import Pool
from laws.published import SETTINGS, STEPS, Rule, followed, simulate
from laws.rows import RowsTask
from laws.strategies import asks
from laws.worlds import first_difference

# name: (ranks, what chooses it, the rule as published, synchronous steps before it)
CASES: dict[str, tuple[int, dict[str, Any], Callable[[], Rule], int]] = {
    "mean": (3, {"strategy": "local", "sync_every": 4}, lambda: published.averaging(4), 0),
    "mean-by-tokens": (2, {"strategy": "local", "sync_every": "150tokens"}, lambda: published.by_tokens(150), 0),
    "post-local": (
        2, {"strategy": "local", "sync_every": 3, "local_after": 8},
        lambda: published.after(8, published.averaging(3)), 8,
    ),
    "hierarchical": (
        4, {"strategy": "local", "sync_every": 2, "group_size": 2, "global_every": 6, "global_batch_size": 8},
        lambda: published.in_groups(2, 2, 6), 0,
    ),
    "one-shot": (2, {"strategy": "local", "sync_every": "end"}, lambda: lambda world, done: None, 0),
    "slowmo": (
        3, {"strategy": "local", "sync_every": 4, "averaging": "slowmo", "outer_lr": 0.9, "outer_momentum": 0.6},
        lambda: published.with_outer(4, published.slowmo(0.9, 0.6)), 0,
    ),
    "bmuf": (
        3, {"strategy": "local", "sync_every": 4, "averaging": "bmuf"},
        lambda: published.with_outer(4, published.block_momentum(1 - 1 / 3, 1.0)), 0,
    ),
    "elastic": (
        3, {"strategy": "local", "sync_every": 4, "averaging": "elastic"}, lambda: published.elastic(4, 0.9), 0,
    ),
    "diloco": (
        3, {"strategy": "diloco", "sync_every": 5}, lambda: published.with_outer(5, published.nesterov(0.7, 0.9)), 0
    ),
    "diloco-after-synchronous-steps": (
        2, {"strategy": "diloco", "sync_every": 4, "local_after": 6, "outer_lr": 0.5, "outer_momentum": 0.8},
        lambda: published.after(6, published.with_outer(4, published.nesterov(0.5, 0.8))), 6,
    ),
    "diloco-streaming": (
        2, {"strategy": "diloco", "sync_every": 6, "fragments": 3, "overlap_steps": 2, "mixing": 0.5},
        lambda: published.streaming(6, 3, 2, 0.5, 0.7, 0.9), 0,
    ),
    "sparseloco": (
        3, {"strategy": "diloco", "sync_every": 4, "outer_lr": 1.0, "outer_momentum": 0.0, "codec": "topk",
            "two_bits": True, "topk_chunk": 16, "density": 0.2, "error_decay": 0.95},
        lambda: published.sparse(4, 0.2, 16, 0.95, 1.0), 0,
    ),
    "noloco": (
        4, {"strategy": "noloco", "sync_every": 3, "global_batch_size": 16},
        lambda: published.in_pairs(3, 0.7, 0.5, 1.0), 0,
    ),
    "noloco-with-one-left-over": (
        3, {"strategy": "noloco", "sync_every": 4, "outer_lr": 0.6, "outer_momentum": 0.4},
        lambda: published.in_pairs(4, 0.6, 0.4, 1.0), 0,
    ),
}  # fmt: skip


@asks(6, "local", "local-slowmo", "diloco", "diloco-streaming", "noloco")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_published_rule(pool: Pool, tmp_path: Path, case: str, optimizer: str) -> None:
    ranks, chosen, rule, together = CASES[case]
    task = RowsTask("tied")
    settings = SETTINGS | chosen | {"optim": optimizer, "output_dir": str(tmp_path)}
    records = pool.world(ranks, followed, task, **settings)
    expected = simulate(task, ranks, optimizer, rule(), STEPS, together, settings["global_batch_size"])
    for rank, (record, by_rule) in enumerate(zip(records, expected, strict=True)):
        assert first_difference(by_rule, record, 1e-10) is None, f"rank {rank}"


ONE_STEP = {"sync_every": 1, "optim": "sgd"}
ORACLES = {  # each at a setting where it is another, known method
    "diloco that only averages is local": (
        {"strategy": "diloco", "sync_every": 4, "outer_lr": 1.0, "outer_momentum": 0.0},
        {"strategy": "local", "sync_every": 4},
    ),
    "diloco at every step, only averaging, is synchronous": (
        {"strategy": "diloco", "outer_lr": 1.0, "outer_momentum": 0.0, **ONE_STEP},
        {"strategy": "allreduce", "optim": "sgd"},
    ),
    "local at every step is synchronous": (
        {"strategy": "local", **ONE_STEP}, {"strategy": "allreduce", "optim": "sgd"}
    ),
    "bmuf is slowmo with rate 1": (
        {"strategy": "local", "sync_every": 4, "averaging": "bmuf", "outer_momentum": 0.6},
        {"strategy": "local", "sync_every": 4, "averaging": "slowmo", "outer_momentum": 0.6},
    ),
    "a pair that only averages is local": (
        {"strategy": "noloco", "sync_every": 4, "outer_lr": 1.0, "outer_momentum": 0.0},
        {"strategy": "local", "sync_every": 4},
    ),
    "always synchronous is all-reduce": (
        {"strategy": "diloco", "local_after": STEPS}, {"strategy": "allreduce"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("oracle", ORACLES)
def test_oracles(pool: Pool, tmp_path: Path, oracle: str) -> None:
    task = RowsTask("tied", full=True)  # with equal labels the mean of the replicas' means is the mean
    one, other = (
        pool.world(2, followed, task, **SETTINGS | chosen | {"output_dir": str(tmp_path / str(i))})
        for i, chosen in enumerate(ORACLES[oracle])
    )
    for a, b in zip(one, other, strict=True):
        assert first_difference(a, b, 1e-10) is None
