"""Law 10: a fault at a chosen (rank, step, phase) ends in one clear error or the agreed skip: no hang, no wrong number."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from laws.launches import BATCH, MODEL, Fault, is_alive, shoal, workers_of
from laws.pool import Outcome, Pool, Started
from laws.strategies import STRATEGIES, each_that_keeps

from shoal.errors import DONE, FAILED, INTERRUPTED, PREEMPTED


def flags(strategy: str) -> list[str]:
    """The flags that ask for a strategy."""
    return [f"--{key}={value}" for key, value in STRATEGIES[strategy].settings.items()]


@pytest.fixture(scope="module")
def data(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a small prepared corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"net {i} " + "the fish swim, the tide goes out " * (12 + i))
    words = ["--data", str(folder), "--cache-dir", str(tmp_path_factory.mktemp("cache")), *MODEL]
    prepared = pool.alone(shoal, ["prepare", *words])
    assert prepared.code == DONE, prepared.output
    return words


def train_words(data: list[str], run: Path, *more: Any) -> list[str]:
    return ["train", *data, *BATCH, "--output-dir", str(run), "--save-steps", "3", *map(str, more)]


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def last_line(outcome: Outcome) -> str:
    return outcome.output.strip().splitlines()[-1]


def test_print(pool, data, tmp_path):
    t=time.time()
    o = pool.alone(shoal, train_words(data, tmp_path, "--max-steps", 6, "--nproc-per-node", 2))
    print(time.time()-t)
    print(o.output[-300:], o.code, o.trace)
    for kind in ("raise","nan","sigterm"):
        for phase in ("forward", "backward", "exchange", "update", "observe", "save"):
            t=time.time()
            o = pool.alone(shoal, train_words(data, tmp_path/kind/phase, "--max-steps", 6, "--nproc-per-node", 2), Fault(kind, 0 if phase=="save" else 1, 2, phase))
            print(kind, phase, time.time()-t)
            print(o.output[-300:], o.code, o.trace)
    assert 0
