"""Laws 2, 3, 4, 8 and 9 for replicas whose layers are cut over a team: they follow one process in float64."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws.layouts import STEPS, follow_in_pieces, resume_all, sent_and_predicted, together
from laws.models import ModelTask
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow, run_of
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.wire.mesh import Mesh

# Of each layout how many ranks it is tried on, how many of them hold a replica, and how it is asked for.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp2": (2, 2, {"tp": 2}),
    "tp4": (4, 4, {"tp": 4}),
    "tp2-zero3": (4, 4, {"tp": 2, "zero_stage": 3}),
    "tp2-zero1": (4, 4, {"tp": 2, "zero_stage": 1}),
    "tp2-replicate2": (4, 2, {"tp": 2, "dp_replicate": 2}),
}
SOME = ("tp2", "tp4", "tp2-zero3", "tp2-replicate2")
CASES = {
    "llama": ("tp2", "tp2-zero3"),
    "gpt2": (*SOME, "tp2-zero1"),
    "bert": ("tp2", "tp2-zero3"),
    "qwen3": ("tp2",),
    "gpt_neox": ("tp4",),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_team_follows_one_process(pool: Pool, kind: str, tmp_path: Path) -> None:
    task = ModelTask(kind, dropout=0.1)
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **STEPS)
    for layout in CASES[kind]:
        ranks, island, settings = LAYOUTS[layout]
        folder = str(tmp_path / layout)
        cut = pool.world(ranks, follow_in_pieces, "allreduce", task, output_dir=folder, **STEPS, **settings)
        for first in range(0, ranks, island):
            on_island = cut[first : first + island]
            whole = [together([held[step] for _, held, _ in on_island]) for step in range(4)]
            trained = [{name: step[name] for name in alone.tensors[0]} for step in whole]
            assert first_difference(alone.tensors, trained, 1e-10) is None, layout
            for losses, _, _ in on_island:
                assert np.allclose(losses, alone.losses, rtol=1e-11), layout
        assert len({metrics["eval/loss"] for _, _, metrics in cut}) == 1, layout


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", "tp2"),
        ("llama", "tp2-zero3"),
        ("gpt2", "tp4"),
        ("gpt2", "tp2-zero1"),
        ("bert", "tp2"),
        ("t5", "tp2"),
    ],
)
def test_predicted_bytes_are_sent(pool: Pool, kind: str, layout: str) -> None:
    """Law 9, within an island."""
    ranks, _, settings = LAYOUTS[layout]
    for on_rank in pool.world(ranks, sent_and_predicted, ModelTask(kind, full=True), **STEPS, **settings):
        for sent, predicted in on_rank:
            assert sent == predicted > 0


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8, for every ordered pair, of a model whose pieces are several blocks of a matrix."""
    task = ModelTask("gpt2", dropout=0.1)
    layouts = {"alone": (1, 1, {}), "zero3": (2, 2, {"zero_stage": 3})}
    layouts |= {name: LAYOUTS[name] for name in ("tp4", "tp2-zero3")}
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


class Shorter(ModelTask):
    """`ModelTask` whose encoder reads every other token only."""

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return super().loss(model, {**inputs, "encoded": inputs["tokens"][:, ::2]})


def test_encoder_and_decoder_have_tokens_of_their_own(pool: Pool, tmp_path: Path) -> None:
    """Laws 2 and 8, where ZeRO cuts further, and layers of both are computed again in the backward pass."""
    task, steps = Shorter("t5", dropout=0.1), {**STEPS, "save_steps": 3}
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=whole, **steps)
    ranks, _, settings = LAYOUTS["tp2-zero3"]
    settings = {**settings, **steps, "output_dir": cut, "gradient_checkpointing": "full"}
    on_rank = pool.world(ranks, follow_in_pieces, "allreduce", task, **settings)
    found = [together([held[step] for _, held, _ in on_rank]) for step in range(4)]
    assert first_difference(alone.tensors, found, 1e-10) is None
    for ranks, settings, start in ((2, {"tp": 2}, whole), (1, {}, cut)):
        folder = str(tmp_path / f"from-{ranks}")
        resumed = pool.world(ranks, resume_all, task, [f"{start}/checkpoint-3"], folder, **settings)
        last = together([each[0][0] for each in resumed])
        assert first_difference([alone.tensors[-1]], [last], 1e-10) is None, start


@pytest.mark.parametrize("strategy", ["diloco", "gossip"])
def test_strategies_between_teams(pool: Pool, strategy: str, tmp_path: Path) -> None:
    """Replicas of a team each do what replicas of one rank each do: no strategy knows of the layout."""
    task = ModelTask("gpt2", dropout=0.1)
    steps = {**STEPS, "global_batch_size": 16, "max_steps": 6}
    whole = pool.world(2, follow_in_pieces, strategy, task, output_dir=str(tmp_path / "whole"), **steps)
    teams = {"dp_replicate": 2, "tp": 2, "output_dir": str(tmp_path / "teams")}
    cut = pool.world(4, follow_in_pieces, strategy, task, **steps, **teams)
    for replica in range(2):
        for step in range(steps["max_steps"]):
            one = together([whole[replica][1][step]])
            found = together([held[step] for _, held, _ in cut[2 * replica : 2 * replica + 2]])
            assert first_difference([one], [found], 1e-10) is None, step
    assert np.isclose(cut[0][2]["eval/loss"], whole[0][2]["eval/loss"], rtol=1e-11)


def exchanges(mesh: Mesh, task: ModelTask) -> Counter[str]:
    """How often a rank begins an exchange of each kind within a micro-batch."""
    run = run_of(mesh, "allreduce", task, **{**STEPS, "global_batch_size": 2}, tp=2)
    wire, told = run.mesh.wire("tensor"), Counter[str]()

    def count(name: str, start: Callable[..., Any]) -> None:
        def counted(*args: Any, **named: Any) -> Any:
            told[name] += 1
            return start(*args, **named)

        setattr(wire, name, counted)

    for name in ("start_exchange", "start_all_gather", "start_all_reduce"):
        count(name, getattr(wire, name))
    run.replica.gradients(run.batches.at(0))
    return told


def test_queries_keys_and_values_are_one_exchange(pool: Pool) -> None:
    """Of a layer: the tokens are gathered for attention and MLP, and the sum scattered; and so backward."""
    layers = 2
    for told in pool.world(2, exchanges, ModelTask("llama")):
        assert told["start_exchange"] == 4 * layers
        assert told["start_all_gather"] == 4 * layers + 3  # before and after the layers, and for the loss
        assert told["start_all_reduce"] == layers + 2  # gradients of norms, embeddings, the head


class Changed(ModelTask):
    """`ModelTask` with another model."""

    def model(self) -> nn.Module:
        model = super().model()
        if self.kind == "llama":
            model.set_attn_implementation("eager")
        if self.kind == "gpt_neox":
            model._tp_plan["gpt_neox.layers.*.mlp.dense_h_to_4h"] = "packed_colwise"
        return model


def refused(mesh: Mesh, task: RowsTask) -> str:
    with pytest.raises(UserError) as error:
        run_of(mesh, "allreduce", task, **{**STEPS, "global_batch_size": 6}, tp=mesh.world_size)
    return str(error.value)


REFUSALS = {
    "heads": (3, ModelTask("gpt2"), "--tp 3: 4 attention heads do not divide by it; take one of 1, 2, 4"),
    "no-plan": (2, RowsTask("stacked"), "--tp 2: no plan says how to cut layers.0.0 of Net; take bert"),
    "style": (2, Changed("gpt_neox"), "gpt_neox.layers.0.mlp.dense_h_to_4h of gpt_neox is cut in a way"),
    "dropout": (
        2,
        Changed("llama", dropout=0.1),
        "would draw other dropout masks than one worker; add --model.att",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_cut_is_refused(pool: Pool, case: str) -> None:
    ranks, task, line = REFUSALS[case]
    for said in pool.world(ranks, refused, task):
        assert line in said
