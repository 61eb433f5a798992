"""Layouts of several axes at once: they follow one process, and of 64 ranks each element is held by one."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from laws.layouts import STEPS, follow_in_pieces, resume_all, sent_and_predicted, together
from laws.models import ModelTask
from laws.packed import PackedTask
from laws.pool import Pool
from laws.staged import ModelTask as StagedTask
from laws.worlds import first_difference, follow
from torch.testing._internal.distributed.fake_pg import FakeStore

from shoal import layouts
from shoal.config import load_config, resolve_grid
from shoal.layouts.base import MicroBatch
from shoal.tensors import precision
from shoal.wire.mesh import Axis, Mesh
from shoal.wire.wire import Wire

RANKS = 64
EXCHANGES = ("start_all_gather", "start_reduce_scatter", "start_exchange")


WINDOWS, ROWS = PackedTask("gpt2", dropout=0.1, length=16), ModelTask("gpt2", dropout=0.1)
PADDED = PackedTask("gpt2", length=16, packing=False)
# Of each a task whose micro-batches may be of any length, where the layouts take it, and how it is asked for.
PRODUCTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pipeline-context": (WINDOWS, {"pp": 2, "cp": 2}),
    "pipeline-tensor": (ROWS, {"pp": 2, "tp": 2}),
    "pipeline-tensor-padded": (PADDED, {"pp": 2, "tp": 2}),
    "pipeline-tensor-interleaved": (
        StagedTask("llama"),
        {"pp": 2, "tp": 2, "pp_schedule": "interleaved-1f1b"},
    ),
    "pipeline-tensor-again": (ROWS, {"pp": 2, "tp": 2, "gradient_checkpointing": "full"}),
    "pipeline-context-again": (WINDOWS, {"pp": 2, "cp": 2, "gradient_checkpointing": "full"}),
    "tensor-context-again": (WINDOWS, {"tp": 2, "cp": 2, "gradient_checkpointing": "full"}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_follows_one_process(pool: Pool, name: str, tmp_path: Path) -> None:
    task, settings = PRODUCTS[name]
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **STEPS)
    cut = pool.world(
        4, follow_in_pieces, "allreduce", task, output_dir=str(tmp_path / "cut"), **STEPS, **settings
    )
    whole = [together([held[step] for _, held, _ in cut]) for step in range(4)]
    assert first_difference(alone.tensors, whole, 1e-10) is None
    for losses, _, _ in cut:
        assert np.allclose(losses, alone.losses, rtol=1e-11)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (PackedTask("gpt2", length=16), {"pp": 2, "cp": 2}),
        (PackedTask("gpt2", length=16), {"tp": 2, "cp": 2}),
        (ModelTask("llama", full=True), {"pp": 2, "tp": 2}),
        (ModelTask("gpt2", layers=4, full=True), {"pp": 2, "tp": 2, "pp_schedule": "interleaved-1f1b"}),
        (ModelTask("gpt2", dropout=0.1, full=True), {"pp": 2, "tp": 2}),
    ],
)
def test_predicted_bytes_are_sent(pool: Pool, task: Any, settings: dict[str, Any]) -> None:
    """Law 9, within an island."""
    for on_rank in pool.world(4, sent_and_predicted, task, **STEPS, **settings):
        for sent, predicted in on_rank:
            assert sent == predicted > 0


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8, of tied embeddings cut by rows, held by two stages."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "alone": (1, {}),
        "pipeline-tensor": (4, {"pp": 2, "tp": 2}),
    }
    (whole,) = pool.world(1, follow, "allreduce", ROWS, output_dir=str(tmp_path / "whole"), **STEPS)
    saved = []
    for name, (ranks, settings) in layouts.items():
        first = {"output_dir": str(tmp_path / name), "save_steps": 3, "stop_after": 3}
        pool.world(ranks, follow, "allreduce", ROWS, **STEPS, **settings, **first)
        saved.append(str(tmp_path / name / "checkpoint-3"))
    for name, (ranks, settings) in layouts.items():
        on_rank = pool.world(ranks, resume_all, ROWS, saved, str(tmp_path / f"from-{name}"), **settings)
        for number, start in enumerate(saved):
            found = together([each[number][0] for each in on_rank])
            assert first_difference([whole.tensors[-1]], [found], 1e-10) is None, (name, start)


def seen_from(rank: int, task: Any, settings: dict[str, int]) -> tuple[dict[str, Any], Counter[str]]:
    """One rank of 64, whose exchanges bring nothing: its blocks of each parameter, and its exchanges in one step."""
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        group = dist.distributed_c10d._get_default_group()
        alone = Mesh(rank, RANKS, torch.device("cpu"), group, {"replicate": Axis(RANKS, rank, group)})
        config = load_config(None, [], {}, **settings).config
        mesh = alone.cut(resolve_grid(config, RANKS))
        policy = precision.resolve("64-true", mesh.device)
        inputs = task.samples("train").collate(np.arange(2))
        placed = layouts.place(task.model(), task.loss, mesh, policy, config.layout, inputs)
        blocks = {
            piece.name: (tuple(piece.shape), [(b.offset, b.size) for b in piece.blocks])
            for piece in placed.pieces
        }
        return blocks, _exchanges(placed, inputs, policy)
    finally:
        dist.destroy_process_group()


def _exchanges(placed: Any, inputs: dict[str, torch.Tensor], policy: Any) -> Counter[str]:
    counted: Counter[str] = Counter()
    originals = {name: getattr(Wire, name) for name in EXCHANGES}

    def counting(name: str) -> Any:
        def start(*args: Any, **named: Any) -> Any:
            counted[name] += 1
            return originals[name](*args, **named)

        return start

    for name in originals:
        setattr(Wire, name, counting(name))
    try:
        autocast = lambda: policy.autocast(torch.device("cpu"))  # noqa: E731
        placed.forward_backward([MicroBatch(inputs, 0)], 1.0, autocast, last=True)
    finally:
        for name, original in originals.items():
            setattr(Wire, name, original)
    return counted


def island_of(task: Any, settings: dict[str, int], size: int) -> list[tuple[dict[str, Any], Counter[str]]]:
    return [seen_from(rank, task, settings) for rank in range(size)]


GRIDS: dict[str, tuple[Any, dict[str, int], int]] = {
    "tensor": (ModelTask("llama", full=True), {"dp_replicate": 2, "dp_shard": 8, "tp": 4}, 32),
    "pipeline": (StagedTask("llama", full=True), {"dp_replicate": 4, "dp_shard": 4, "pp": 4}, 16),
    "tensor-pipeline": (
        StagedTask("llama", full=True),
        {"dp_replicate": 4, "dp_shard": 2, "tp": 4, "pp": 2},
        16,
    ),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_an_island_of_64_ranks_holds_every_element_once(pool: Pool, grid: str) -> None:
    task, settings, size = GRIDS[grid]
    outcome = pool.alone(island_of, task, settings, size)
    assert not outcome.code, outcome.trace
    held: dict[str, np.ndarray] = {}
    for pieces, _ in outcome.value:
        for name, (shape, blocks) in pieces.items():
            count = held.setdefault(name, np.zeros(shape, dtype=int))
            for offset, extent in blocks:
                count[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))] += 1
    assert all((count == 1).all() for count in held.values())


def test_the_exchanges_of_a_layer_on_64_ranks(pool: Pool) -> None:
    """Of ZeRO 3 two gathers and a scatter a layer; of tensor parallel for either pair a gather and a scattered sum,
    forward and backward."""
    counts = []
    for layers in (2, 3):
        task = StagedTask("llama", full=True, layers=layers)
        outcome = pool.alone(island_of, task, {"dp_replicate": 2, "dp_shard": 8, "tp": 4}, 1)
        assert not outcome.code, outcome.trace
        counts.append(outcome.value[0][1])
    more = counts[1] - counts[0]
    assert more == {"start_all_gather": 2 + 4, "start_reduce_scatter": 1, "start_exchange": 4}
