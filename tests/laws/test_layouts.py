"""Laws 2, 3, 4 and 8 for replicas that several ranks hold together: they follow one process in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws.layouts import (
    LAYOUTS,
    STEPS,
    follow_in_pieces,
    resume_all,
    sent_and_predicted,
    together,
)
from laws.models import ModelTask
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow

from shoal.tensors.piece import Block
from shoal.wire.mesh import Mesh

SHAPES = ("llama", "gpt2", "bert", "t5")


def of_all(
    mesh: Mesh, function: Callable[..., Any], kinds: list[str], folder: str, **settings: Any
) -> list[Any]:
    """`function` for one task after the other, in one world."""
    return [
        function(
            mesh, "allreduce", RowsTask(kind, dropout=0.1), output_dir=f"{folder}/{kind}", **STEPS, **settings
        )
        for kind in kinds
    ]


def test_a_cut_replica_follows_one_process(pool: Pool, tmp_path: Path) -> None:
    kinds = ["stacked", "tied", "frozen", "unused", "sometimes"]
    (alone,) = pool.world(1, of_all, follow, kinds, str(tmp_path / "alone"))
    for layout, (ranks, island, settings) in LAYOUTS.items():
        on_ranks = pool.world(ranks, of_all, follow_in_pieces, kinds, str(tmp_path / layout), **settings)
        for kind, one, cut in zip(kinds, alone, zip(*on_ranks, strict=True), strict=True):
            for first in range(0, ranks, island):
                on_island = cut[first : first + island]
                whole = [together([held[step] for _, held, _ in on_island]) for step in range(4)]
                trained = [{name: step[name] for name in one.tensors[0]} for step in whole]
                assert first_difference(one.tensors, trained, 1e-10) is None, (layout, kind)
                for losses, _, _ in on_island:
                    assert np.allclose(losses, one.losses, rtol=1e-11), (layout, kind)
            assert len({metrics["eval/loss"] for _, _, metrics in cut}) == 1, (layout, kind)


def each_shape(mesh: Mesh, function: Callable[..., Any], folder: str, **settings: Any) -> list[Any]:
    """`function` for models as they are on Hugging Face: decoders, tied and not, an encoder, and both together."""
    return [
        function(
            mesh,
            "allreduce",
            ModelTask(kind, dropout=0.1),
            output_dir=f"{folder}/{kind}",
            **STEPS,
            **settings,
        )
        for kind in SHAPES
    ]


def test_models_of_every_shape_follow_one_process(pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool.world(1, each_shape, follow, str(tmp_path / "alone"))
    for layout in ("zero1", "zero3", "hybrid"):
        ranks, island, settings = LAYOUTS[layout]
        on_ranks = pool.world(ranks, each_shape, follow_in_pieces, str(tmp_path / layout), **settings)
        for kind, one, cut in zip(SHAPES, alone, zip(*on_ranks, strict=True), strict=True):
            whole = [together([held[step] for _, held, _ in cut[:island]]) for step in range(4)]
            assert first_difference(one.tensors, whole, 1e-10) is None, (layout, kind)
            assert np.allclose(cut[0][0], one.losses, rtol=1e-11), (layout, kind)


def test_the_pieces_do_not_fit_where_a_rank_computes_otherwise() -> None:
    """The law above can fail: two ranks that hold the same rows are found."""
    piece = ((4,), (Block((0,), (0,), (2,)),), np.zeros(2))
    with pytest.raises(AssertionError, match="twice"):
        together([{"a": piece}, {"a": piece}])


def sent_for_all(mesh: Mesh, kinds: list[str], **settings: Any) -> dict[str, list[tuple[int, float]]]:
    return {kind: sent_and_predicted(mesh, RowsTask(kind), **settings) for kind in kinds}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predicted_bytes_are_sent(pool: Pool, layout: str) -> None:
    """Law 9, within an island."""
    ranks, _, settings = LAYOUTS[layout]
    for on_rank in pool.world(ranks, sent_for_all, ["stacked", "tied", "frozen"], **STEPS, **settings):
        for kind, steps in on_rank.items():
            for sent, predicted in steps:
                assert sent == predicted > 0, kind


SYNCS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        row: (row, 2, {})
        for row in ("local", "local-slowmo", "diloco", "noloco", "gossip", "gossip-push-sum")
    },
    "clip-each": ("allreduce", 2, {"clip_each": 0.5}),
    "normalize-each": ("allreduce", 2, {"normalize": "each", "learning_rate": 0.01}),
    "guard-on-drift": ("local", 2, {"guard": 9.0, "guard_drift": 0.001, "sync_every": 2, "max_steps": 14}),
    "server": ("server", 2, {}),
    "servers": ("server", 2, {"servers": 2, "share_memory": False}),
    "server-median": ("server", 2, {"aggregation": "median"}),
    "async-in-step": ("async", 2, {"max_staleness": 0, "collect": 2}),
    "groups": ("local", 4, {"group_size": 2, "global_every": 4, "sync_every": 2}),
}


@pytest.mark.parametrize("case", SYNCS)
def test_strategies_between_islands(pool: Pool, case: str, tmp_path: Path) -> None:
    """Replicas of two ranks each do what replicas of one rank each do: no strategy knows of the layout."""
    task = RowsTask("stacked", dropout=0.1)
    strategy, replicas, settings = SYNCS[case]
    steps = {**STEPS, "global_batch_size": 16, "max_steps": 6, **settings}
    whole = pool.world(
        replicas, follow_in_pieces, strategy, task, output_dir=str(tmp_path / "whole"), **steps
    )
    for stage in (1, 3):
        islands = {"dp_replicate": replicas, "zero_stage": stage, "output_dir": str(tmp_path / str(stage))}
        cut = pool.world(2 * replicas, follow_in_pieces, strategy, task, **steps, **islands)
        for replica in range(replicas):
            for step in range(steps["max_steps"]):
                one = together([whole[replica][1][step]])
                found = together([held[step] for _, held, _ in cut[2 * replica : 2 * replica + 2]])
                assert first_difference([one], [found], 1e-10) is None, (stage, step)
        assert np.allclose(cut[0][0], whole[0][0], rtol=1e-11)
        assert np.isclose(cut[0][2]["eval/loss"], whole[0][2]["eval/loss"], rtol=1e-11)


CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{codec: ("allreduce", {"codec": codec}) for codec in ("fp16", "int8", "int4", "sign")},
    "powersgd": ("allreduce", {"codec": "powersgd", "rank": 1}),
    **{codec: ("allreduce", {"codec": codec, "density": 0.3}) for codec in ("topk", "randomk")},
    "diloco-int4": ("diloco", {"codec": "int4", "sync_every": 3}),
    "server-topk": ("server", {"codec": "topk", "density": 0.3}),
}


@pytest.mark.parametrize("case", CODECS)
def test_codecs_between_islands(pool: Pool, case: str, tmp_path: Path) -> None:
    """Law 4: after a sync the ranks that hold the same pieces of two replicas hold the same bits; and it learns."""
    strategy, settings = CODECS[case]
    steps = {**STEPS, "max_steps": 9, "global_batch_size": 16, "output_dir": str(tmp_path)}
    grid = {"dp_replicate": 2, "zero_stage": 3}
    ranks = pool.world(
        4, follow_in_pieces, strategy, RowsTask("stacked", full=True), **steps, **grid, **settings
    )
    for place in range(2):
        for name, (shape, offset, values) in ranks[place][1][-1].items():
            other = ranks[2 + place][1][-1][name]
            assert other[:2] == (shape, offset)
            assert np.array_equal(values, other[2]), name
    losses = ranks[0][0]
    assert losses[-1] < losses[0]


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8, for every ordered pair: the run ends as if it had never been cut otherwise."""
    task = RowsTask("stacked", dropout=0.1)
    layouts = {"alone": (1, 1, {}), "replicated": (2, 1, {}), **LAYOUTS}
    (whole,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "whole"), **STEPS)
    saved = []
    for name, (ranks, _, settings) in layouts.items():
        first = {"output_dir": str(tmp_path / name), "save_steps": 3, "stop_after": 3}
        pool.world(ranks, follow, "allreduce", task, **STEPS, **settings, **first)
        saved.append(str(tmp_path / name / "checkpoint-3"))
    for name, (ranks, island, settings) in layouts.items():
        folder = str(tmp_path / f"from-{name}")
        on_rank = pool.world(ranks, resume_all, task, saved, folder, **settings)
        for number, start in enumerate(saved):
            found = together([each[number][0] for each in on_rank[:island]])
            trained = {tensor: found[tensor] for tensor in whole.tensors[-1]}
            assert first_difference([whole.tensors[-1]], [trained], 1e-10) is None, (name, start)
            assert np.isclose(on_rank[0][number][1], whole.losses[-1], rtol=1e-11), (name, start)
