"""Law 2: one global batch, cut in any way over ranks, accumulation and micro-batches, gives the same gradient."""

from typing import Any

import numpy as np
import pytest
from laws.plain import at_once
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import each_that_keeps
from laws.worlds import first_difference, gradients

SEED, ROWS = 11, 24
SHARES = {1: ["off"], 2: ["off", "1,{rest}"], 3: ["off", "2,{rest},1"], 4: ["off", "{rest},1,2,1"]}


def cuts(ranks: int, micro_batch_sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Settings that cut the same batch: by micro-batch size, and by equal or unequal shares of the ranks."""
    found = []
    for size in micro_batch_sizes:
        micro_batches = ROWS // size
        for shares in SHARES[ranks]:
            rest = micro_batches - sum(int(s) for s in shares.split(",") if s.isdigit())
            if micro_batches >= ranks and rest >= 1:
                found.append({"per_device_train_batch_size": size, "balance": shares.format(rest=rest)})
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "tied"])
@each_that_keeps(2)
def test_every_cut_gives_the_gradient_of_the_whole(pool: Pool, strategy: str, kind: str, ranks: int) -> None:
    task = RowsTask(kind)
    settings = {"precision": "64-true", "seed": SEED, "global_batch_size": ROWS, "bucket_mb": 0.002}
    cases = [settings | cut for cut in cuts(ranks, (1, 3, 6, 24))]
    whole, loss = pool.alone(at_once, task, SEED, ROWS).value
    for on_rank in pool.world(ranks, gradients, strategy, task, cases):
        for case, (found, found_loss) in zip(cases, on_rank, strict=True):
            assert first_difference([whole], [found], 1e-12) is None, case
            assert abs(found_loss - loss) <= 1e-12 * loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["tied", "sometimes"])
@each_that_keeps(2, exact=True)
def test_exact_cuts_give_the_same_bits(pool: Pool, strategy: str, kind: str, precision: str) -> None:
    """Dropout on; 5, 6, 8 and 24 micro-batches, so that most shares are no subtree."""
    task = RowsTask(kind, dropout=0.2)
    found = {}
    for ranks in (1, 2, 3, 4):
        cases = [
            {"global_batch_size": rows, "precision": precision, "seed": SEED, "bucket_mb": 0.002} | cut
            for rows in (ROWS, ROWS - 4)
            for cut in cuts(ranks, (1, 3, 4) if rows == ROWS else (4,))
            if rows == ROWS or cut["balance"] == "off"
        ]
        for on_rank in pool.world(ranks, gradients, strategy, task, cases):
            for case, (grads, loss) in zip(cases, on_rank, strict=True):
                micro_batches = (case["global_batch_size"], case["per_device_train_batch_size"])
                first_grads, first_loss, first_case = found.setdefault(micro_batches, (grads, loss, case))
                assert first_difference([first_grads], [grads]) is None, (first_case, case)
                assert first_loss == loss


@each_that_keeps(2, exact=True)
def test_the_order_of_summation_matters_here(pool: Pool, strategy: str) -> None:
    """Without the tree the same cuts do not give the same bits: the test above can fail."""
    fast = strategy.removesuffix("-exact")
    task = RowsTask(dropout=0.2)
    case = {"global_batch_size": ROWS, "per_device_train_batch_size": 1, "precision": "32-true", "seed": SEED}
    (one,) = pool.world(1, gradients, fast, task, [case])
    three = pool.world(3, gradients, fast, task, [case])[0]
    assert any(not np.array_equal(one[0][0][name], three[0][0][name]) for name in one[0][0])
