"""Laws 2, 3, 8 and 9 for sequences cut over ranks: they follow one process in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.layouts import STEPS, follow_in_pieces, resume_all, sent_and_predicted, together
from laws.models import ModelTask
from laws.packed import PackedTask
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow, run_of
from torch import Tensor

from shoal.config import LayoutConfig
from shoal.layouts import replicated
from shoal.layouts.base import Request
from shoal.layouts.context import Context
from shoal.models.heads import final_hidden
from shoal.models.isolation import packed_inputs
from shoal.tensors.precision import resolve
from shoal.wire.mesh import Mesh

# Of each layout how many ranks it is tried on, how many of them hold a replica, and how it is asked for.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "cp2": (2, 2, {"cp": 2}),
    "cp2-zero1": (2, 2, {"cp": 2, "zero_stage": 1}),
    "cp3": (3, 3, {"cp": 3}),
    "cp4": (4, 4, {"cp": 4}),
    "cp2-replicate2": (4, 2, {"cp": 2, "dp_replicate": 2}),
    "cp2-shard2": (4, 4, {"cp": 2, "dp_shard": 2}),
}
KINDS = {"llama": ("cp2", "cp2-replicate2"), "gpt2": ("cp2", "cp4", "cp2-shard2")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_sequence_follows_one_process(pool: Pool, kind: str, tmp_path: Path) -> None:
    task = PackedTask(kind, dropout=0.1)
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **STEPS)
    evaluations = set()
    for layout in KINDS[kind]:
        ranks, island, settings = LAYOUTS[layout]
        folder = str(tmp_path / layout)
        cut = pool.world(ranks, follow_in_pieces, "allreduce", task, output_dir=folder, **STEPS, **settings)
        for first in range(0, ranks, island):
            on_island = cut[first : first + island]
            whole = [together([held[step] for _, held, _ in on_island]) for step in range(4)]
            assert first_difference(alone.tensors, whole, 1e-10) is None, layout
            for losses, _, _ in on_island:
                assert np.allclose(losses, alone.losses, rtol=1e-11), layout
        evaluations |= {round(metrics["eval/loss"], 11) for _, _, metrics in cut}
    assert len(evaluations) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_bytes_are_sent(pool: Pool, kind: str) -> None:
    """Law 9, within an island."""
    for name in ("cp2-zero1", "cp3", "cp2-shard2"):
        ranks, _, settings = LAYOUTS[name]
        for on_rank in pool.world(ranks, sent_and_predicted, PackedTask(kind), **STEPS, **settings):
            for sent, predicted in on_rank:
                assert sent == predicted > 0, name


def own_bytes(mesh: Mesh, task: PackedTask, **settings: Any) -> float:
    run = run_of(mesh, "allreduce", task, **settings)
    assert run.replica.placed._inner is not None
    return run.replica.placed._inner._cost(1, (2, 16))


@pytest.mark.parametrize(("kind", "width"), [("llama", 2 * 2 * 8), ("gpt2", 2 * 4 * 8)])
def test_what_it_sends_is_what_is_published(pool: Pool, kind: str, width: int) -> None:
    """Of 2 layers the keys and values of all tokens but one's own, and their gradients, at 8 bytes."""
    for sent in pool.world(2, own_bytes, PackedTask(kind, length=16), cp=2, **STEPS):
        assert sent == 2 * 2 * (1 / 2) * (2 * 16) * width * 8


def moved(mesh: Mesh, task: PackedTask, row: int) -> list[set[int]]:
    """Of each document of a window: which documents have a token here whose hidden state moves with its ids.

    They are counted from the one that is altered.
    """
    policy, samples = resolve("64-true", mesh.device), task.samples("train")
    mesh = mesh.cut({"context": mesh.world_size})
    inputs = samples.collate(np.array([row]))
    placed = replicated.place(task.model().eval(), task.loss, mesh, policy)
    context = Context(placed, Request(mesh, policy, LayoutConfig(), inputs))
    documents = inputs["documents"][0]

    def hidden(ids: Tensor) -> Tensor:
        part = context._part({**inputs, "input_ids": ids})
        packed = packed_inputs(part["input_ids"], part["documents"], part["position_ids"])
        with torch.no_grad():
            return final_hidden(context.model, packed)[0]

    own = context._own(len(documents))
    before, found = hidden(inputs["input_ids"]), []
    for altered in documents.unique():
        ids = torch.where(documents == altered, (inputs["input_ids"] + 5) % 37, inputs["input_ids"])
        changed = (hidden(ids) != before).any(-1) & (own < len(documents))
        found.append({int(document) - int(altered) for document in documents[own[changed]]})
    return found


@pytest.mark.parametrize("row", [4, 7, 9])
def test_a_document_never_moves_another(pool: Pool, row: int) -> None:
    """With boundaries at the end of a chunk and within one."""
    on_ranks = pool.world(2, moved, PackedTask("llama", length=16), row)
    for of_document in zip(*on_ranks, strict=True):
        assert set.union(*of_document) == {0}


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8, between cut sequences and every other layout."""
    task = PackedTask("gpt2", dropout=0.1)
    (whole,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "whole"), **STEPS)
    others = {"alone": (1, 1, {}), "zero3": (2, 2, {"zero_stage": 3})}
    chosen = {**others, "cp2-shard2": LAYOUTS["cp2-shard2"]}
    saved = []
    for name, (ranks, _, settings) in chosen.items():
        first = {"output_dir": str(tmp_path / name), "save_steps": 3, "stop_after": 3}
        pool.world(ranks, follow, "allreduce", task, **STEPS, **settings, **first)
        saved.append(str(tmp_path / name / "checkpoint-3"))
    for name, (ranks, island, settings) in chosen.items():
        starts = saved if name not in others else [each for each in saved if "cp2" in each]
        on_rank = pool.world(ranks, resume_all, task, starts, str(tmp_path / f"from-{name}"), **settings)
        for number, start in enumerate(starts):
            found = together([each[number][0] for each in on_rank[:island]])
            assert first_difference([whole.tensors[-1]], [found], 1e-10) is None, (name, start)
            assert np.isclose(on_rank[0][number][1], whole.losses[-1], rtol=1e-11), (name, start)


def test_a_strategy_between_islands(pool: Pool, tmp_path: Path) -> None:
    """Replicas whose sequences are cut over two ranks do what replicas of one rank do."""
    task = PackedTask("llama", dropout=0.1)
    steps = {**STEPS, "max_steps": 6}
    whole, cut = (
        pool.world(ranks, follow_in_pieces, "diloco", task, output_dir=str(tmp_path / f"{ranks}"), **given)
        for ranks, given in ((2, steps), (4, {**steps, "cp": 2, "dp_replicate": 2}))
    )
    for replica in range(2):
        for step in range(6):
            found = together([held[step] for _, held, _ in cut[2 * replica : 2 * replica + 2]])
            assert first_difference([together([whole[replica][1][step]])], [found], 1e-10) is None, step
    assert np.allclose(cut[0][0], whole[0][0], rtol=1e-11)
    assert np.isclose(cut[0][2]["eval/loss"], whole[0][2]["eval/loss"], rtol=1e-11)


REFUSED = {
    "an LSTM": (PackedTask("lstm"), "LstmForCausalLM has no attention that could be cut"),
    "attention of its own": (PackedTask("eager"), "LlamaForCausalLM has no attention that could be cut"),
    "sliding windows": (PackedTask("sliding"), "MistralForCausalLM has layers that look back 8 tokens only"),
    "tokens that mix": (PackedTask("mixing"), "makes other hidden states of a window that is cut"),
    "rows without documents": (ModelTask("llama"), "does not say which document a token belongs to"),
    "another model": (RowsTask(), "Net has no attention that could be cut"),
    "short windows": (
        PackedTask(length=3),
        "windows of 3 tokens are cut into 4 chunks; set --sequence-length to 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused(pool: Pool, case: str) -> None:
    task, found = REFUSED[case]
    for outcome in pool.wait(pool.start(run_of, "allreduce", task, ranks=2, cp=2, **STEPS)):
        assert outcome.code == 1
        assert outcome.error.startswith("UserError: --cp 2: ")
        assert found in outcome.error
