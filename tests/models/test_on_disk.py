"""A model that starts on disk: the same bits, none of them in this process's own memory, no file left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from laws.layouts import LAYOUTS, pieces_of, together
from laws.models import ModelTask
from laws.pool import Pool
from laws.worlds import first_difference, run_of
from torch import nn

from shoal.config import ModelConfig
from shoal.models import on_disk as disk
from shoal.models.loading import load
from shoal.models.on_disk import cast, into_memory, is_on_disk, on_disk
from shoal.wire.mesh import Mesh

WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192}


CHOSEN = {"vocab_size": 200, "sequence_length": 8, "seed": 3}


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "lstm-tiny"])
def test_random_weights_are_those_of_a_model_in_memory(name: str, tmp_path: Path) -> None:
    sizes = WIDE if name == "llama-tiny" else {"hidden_size": 128, "num_hidden_layers": 2}
    with on_disk(tmp_path):
        held = load(ModelConfig(name=name, **sizes), **CHOSEN)
    plain = load(ModelConfig(name=name, **sizes), **CHOSEN)
    for (each, p), (other, q) in zip(held.named_parameters(), plain.named_parameters(), strict=True):
        assert each == other
        assert torch.equal(p, q), each
        assert is_on_disk(p) == (p.nbytes > disk.SMALL), each
    assert any(is_on_disk(p) for p in held.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_are_those_of_a_model_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    made = load(ModelConfig(name="llama-tiny", **WIDE), vocab_size=200, sequence_length=8)
    made.to(dtype).save_pretrained(tmp_path / "model")
    with on_disk(tmp_path):
        held = load(ModelConfig(name=str(tmp_path / "model")), **CHOSEN)
    large = [p for p in held.parameters() if p.nbytes > disk.SMALL]
    assert large
    assert all(is_on_disk(p) for p in large)
    plain = load(ModelConfig(name=str(tmp_path / "model")), **CHOSEN)
    assert all(torch.equal(p, q) for p, q in zip(held.parameters(), plain.parameters(), strict=True))


def test_it_is_cast_on_disk_and_comes_into_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with on_disk(tmp_path):
        layer = nn.Linear(200, 300)
    before = layer.weight.detach().clone()
    cast(layer.weight, torch.bfloat16)
    assert is_on_disk(layer.weight)
    assert torch.equal(layer.weight, before.bfloat16())
    into_memory(layer)
    assert not is_on_disk(layer.weight)
    assert torch.equal(layer.weight, before.bfloat16())


def started(mesh: Mesh, task: ModelTask, **settings: Any) -> tuple[Any, list[str]]:
    """The pieces that a run starts with, and which of its tensors lie in a file still."""
    disk.SMALL = 100
    run = run_of(mesh, "allreduce", task, **settings)
    run.replica.placed.before_forward()
    held = [p for p in run.replica.model.parameters() if is_on_disk(p)]
    held += [piece.local for piece in run.replica.placed.pieces if is_on_disk(piece.local)]
    return pieces_of(run), [str(tuple(p.shape)) for p in held]


def test_every_layout_starts_with_the_same_bits(pool: Pool, tmp_path: Path) -> None:
    task = ModelTask("gpt2")
    expected = {name: p.detach().numpy() for name, p in task.model().named_parameters()}
    size = {"precision": "32-true", "global_batch_size": 12, "per_device_train_batch_size": 2, "max_steps": 1}
    cuts: dict[str, tuple[int, int, dict[str, Any]]] = {"tp2": (2, 2, {"tp": 2}), "pp2": (2, 2, {"pp": 2})}
    for layout, (ranks, island, cut) in (
        {name: LAYOUTS[name] for name in ("zero3", "hybrid")} | cuts
    ).items():
        held = pool.world(ranks, started, task, output_dir=str(tmp_path / layout), **size, **cut)
        assert not [left for _, left in held if left], layout
        for first in range(0, ranks, island):
            found = together([pieces for pieces, _ in held[first : first + island]])
            assert first_difference([expected], [found]) is None, layout
