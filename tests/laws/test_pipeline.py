"""Laws 2, 3, 8 and 9 for pipelines: whatever the schedule, the stages of a model follow one process in float64."""

import gc
import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from laws import models
from laws.layouts import STEPS, Pieces, follow_in_pieces, resume_all, sent_and_predicted, together
from laws.pool import Pool
from laws.rows import RowsTask
from laws.staged import ModelTask
from laws.worlds import Record, first_difference, follow, run_of
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from shoal.config.layout import ONE_STAGE, Schedule
from shoal.errors import UserError
from shoal.layouts.checking import check
from shoal.layouts.cutting import NoStages, balance, watch
from shoal.layouts.schedule import SCHEDULES, filled, make
from shoal.wire.mesh import Mesh

LLAMA, GPT2 = ModelTask("llama"), ModelTask("gpt2", dropout=0.1)
# Of each how many ranks it is tried on, how many of them hold a replica, and how it is asked for.
PIPELINES: dict[str, tuple[int, int, dict[str, Any]]] = {
    **{name: (2, 2, {"pp": 2, "pp_schedule": name}) for name in get_args(Schedule)},
    "of-4": (4, 4, {"pp": 4}),
    "two-of-2": (4, 2, {"pp": 2, "balance": "5,1"}),
    **{f"zero{stage}": (4, 4, {"pp": 2, "zero_stage": stage}) for stage in (1, 2, 3)},
    "zero3-gpipe": (4, 4, {"pp": 2, "zero_stage": 3, "pp_schedule": "gpipe"}),
}
Followed = tuple[list[float], list[Pieces], dict[str, float]]


def follow_both(mesh: Mesh, folder: str, **settings: Any) -> list[Followed]:
    return [
        follow_in_pieces(mesh, "allreduce", task, output_dir=f"{folder}/{task.kind}", **STEPS, **settings)
        for task in (LLAMA, GPT2)
    ]


@pytest.fixture(scope="module")
def alone(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("alone")
    return [
        pool.world(1, follow, "allreduce", task, output_dir=str(folder / task.kind), **STEPS)[0]
        for task in (LLAMA, GPT2)
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_follows_one_process(pool: Pool, alone: list[Record], name: str, tmp_path: Path) -> None:
    ranks, island, settings = PIPELINES[name]
    on_ranks = pool.world(ranks, follow_both, str(tmp_path), **settings)
    for one, cut in zip(alone, zip(*on_ranks, strict=True), strict=True):
        for first in range(0, ranks, island):
            on_island = cut[first : first + island]
            whole = [together([held[step] for _, held, _ in on_island]) for step in range(4)]
            assert first_difference(one.tensors, whole, 1e-10) is None
        for losses, _, metrics in cut:
            assert np.allclose(losses, one.losses, rtol=1e-11)
            assert metrics == cut[0][2]


@pytest.mark.parametrize("name", PIPELINES)
def test_predicted_bytes_are_sent(pool: Pool, name: str) -> None:
    """Law 9, within an island."""
    ranks, _, settings = PIPELINES[name]
    task = ModelTask("gpt2", dropout=0.1, filled=True)
    for on_rank in pool.world(ranks, sent_and_predicted, task, **{**STEPS, **settings}):
        for sent, predicted in on_rank:
            assert sent == predicted > 0


def test_saved_under_one_and_loaded_under_another(pool: Pool, alone: list[Record], tmp_path: Path) -> None:
    """Law 8: the run ends as if it had never been cut otherwise."""
    layouts = {"alone": (1, 1, {}), **{n: PIPELINES[n] for n in ("zbv-zero-bubble", "zero2")}}
    saved = []
    for name, (ranks, _, settings) in layouts.items():
        first = {"output_dir": str(tmp_path / name), "save_steps": 3, "stop_after": 3}
        pool.world(ranks, follow, "allreduce", GPT2, **STEPS, **settings, **first)
        saved.append(str(tmp_path / name / "checkpoint-3"))
    for name, (ranks, island, settings) in layouts.items():
        for start in saved:
            on_rank = pool.world(ranks, resume_all, GPT2, [start], str(tmp_path / f"as-{name}"), **settings)
            found = together([each[0][0] for each in on_rank[:island]])
            assert first_difference([alone[1].tensors[-1]], [found], 1e-10) is None, (name, start)
            assert np.isclose(on_rank[0][0][1], alone[1].losses[-1], rtol=1e-11), (name, start)


def test_a_family_with_other_inputs_in_front_of_its_layers(pool: Pool, tmp_path: Path) -> None:
    """OPT's positions come after a mask, with documents in it or without."""
    task = models.ModelTask("opt", dropout=0.1, layers=3)
    few = STEPS | {"max_steps": 2}
    one = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "one"), **few)[0]
    cut = pool.world(2, follow_in_pieces, "allreduce", task, output_dir=str(tmp_path / "cut"), **few, pp=2)
    whole = [together([held[step] for _, held, _ in cut]) for step in range(2)]
    assert first_difference(one.tensors, whole, 1e-10) is None
    assert np.allclose(cut[0][0], one.losses, rtol=1e-11)


def test_diloco_between_pipelines(pool: Pool, tmp_path: Path) -> None:
    """Replicas of two ranks each do what replicas of one rank each do: no strategy knows of the layout."""
    steps = {**STEPS, "global_batch_size": 16, "max_steps": 6}
    whole = pool.world(2, follow_in_pieces, "diloco", GPT2, output_dir=str(tmp_path / "whole"), **steps)
    folder = str(tmp_path / "cut")
    cut = pool.world(4, follow_in_pieces, "diloco", GPT2, output_dir=folder, **steps, pp=2)
    for replica, step in itertools.product(range(2), range(6)):
        one = together([whole[replica][1][step]])
        found = together([held[step] for _, held, _ in cut[2 * replica : 2 * replica + 2]])
        assert first_difference([one], [found], 1e-10) is None, step
    assert np.isclose(cut[0][2]["eval/loss"], whole[0][2]["eval/loss"], rtol=1e-11)


def elements_alive(mesh: Mesh, **settings: Any) -> tuple[int, int]:
    """Of all parameters in this process, and of this rank's pieces."""
    run = run_of(mesh, "allreduce", LLAMA, **STEPS, **settings)
    run.replica.gradients(run.batches.at(0))
    gc.collect()
    alive = {each.data_ptr(): each.numel() for each in gc.get_objects() if isinstance(each, nn.Parameter)}
    return sum(alive.values()), sum(piece.local.numel() for piece in run.replica.placed.pieces)


def test_what_other_workers_hold_is_free(pool: Pool) -> None:
    for alive, own in pool.world(2, elements_alive, pp=2):
        assert alive == own


def refused(mesh: Mesh, task: RowsTask, **settings: Any) -> str:
    try:
        run_of(mesh, "allreduce", task, **settings)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        (ModelTask("llama", layers=1), {}, "1 layers, fewer than the 2 stages"),
        (LLAMA, {"pp_schedule": "looped-bfs", "pp_virtual_stages": 3}, "4 layers, fewer than the 6 stages"),
        (RowsTask("plain"), {}, "has no stages: its layers are not one list"),
        (RowsTask("stacked"), {}, "has no stages: it does not compute from input_ids alone"),
    ],
)
def test_a_model_without_stages_is_refused(
    pool: Pool, task: RowsTask, settings: dict[str, Any], said: str
) -> None:
    assert all(said in found for found in pool.world(2, refused, task, pp=2, **settings))


class Odd(nn.Module):
    """Has layers, and `does` between them."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.gate = nn.Parameter(torch.ones(4)) if does == "gate" else None
        self.norm = nn.LayerNorm(4) if does == "norm" else nn.Identity()
        if does == "shared":
            self.layers[2].weight = self.layers[0].weight
        if does == "buffer":
            self.layers[1].register_buffer("seen", torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(self.norm(hidden))
        return hidden


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("gate", "parameters around its layers"),
        ("norm", "share what is outside"),
        ("shared", "share a parameter"),
        ("buffer", "buffers that a checkpoint holds"),
    ],
)
def test_a_model_whose_stages_would_compute_otherwise_is_refused(does: str, said: str) -> None:
    with pytest.raises(NoStages, match=said):
        watch(Odd(does), torch.no_grad(), torch.default_generator)


class Remembers(nn.Module):
    """Every layer reads the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Bilinear(4, 4, 4) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        embedded = hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, embedded)
        return hidden


def test_what_a_later_stage_lacks_is_found_before_anything_is_cut() -> None:
    model = Remembers()
    before = dict(model.named_modules())
    with pytest.raises(NoStages, match="more of its first ones than hidden states"):
        check(
            model,
            lambda model, inputs: model(inputs["tokens"], False).sum(),
            watch(model, nullcontext(), torch.default_generator),
            [range(1), range(1, 3)],
            {"tokens": torch.zeros(2, 9, dtype=torch.long)},
            nullcontext(),
        )
    assert before == dict(model.named_modules())


def test_an_encoder_and_a_decoder_are_no_line() -> None:
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(NoStages, match="not one list"):
        watch(T5ForConditionalGeneration(config), torch.no_grad(), torch.default_generator)


def test_what_is_watched() -> None:
    model = GPT2.model()
    seen = watch(model, torch.no_grad(), torch.default_generator)
    names = {module: name.removeprefix("transformer.") for name, module in model.named_modules()}
    assert [names[each] for each in seen.before] == ["wte", "wpe"]
    assert [names[each] for each in seen.after] == ["ln_f", "lm_head"]
    layers, before, after = seen.costs
    assert layers == [12 * 32**2 + 13 * 32] * 4  # attention and MLP with their biases, two norms
    assert (before, after) == (2 * 32, 2 * 32 + 37 * 32)  # a row of each embedding; norm and head
    assert seen.draws
    assert not watch(LLAMA.model(), torch.no_grad(), torch.default_generator).draws


def test_stages_are_balanced_as_well_as_can_be() -> None:
    """Against every way to cut."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        layers = draw.integers(1, 9, draw.integers(1, 8)).tolist()
        before, after = draw.integers(0, 12, 2).tolist()
        stages = int(draw.integers(1, len(layers) + 1))

        def costs(own: list[range], layers=layers, before=before, after=after) -> list[float]:
            sums = [float(sum(layers[index] for index in stage)) for stage in own]
            return [
                s + (before if i == 0 else 0) + (after if i == len(own) - 1 else 0)
                for i, s in enumerate(sums)
            ]

        every = [
            [range(a, b) for a, b in itertools.pairwise((0, *cuts, len(layers)))]
            for cuts in itertools.combinations(range(1, len(layers)), stages - 1)
        ]
        found = costs(balance(layers, before, after, stages))
        least = min((max(costs(own)), sum(c**2 for c in costs(own))) for own in every)
        assert (max(found), sum(c**2 for c in found)) == least


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_count_of_micro_batches_is_taken(name: str, ranks: int) -> None:
    """Filled up, by few: torch's schedules take it, and one fewer only if it was not filled up."""
    each = 1 if name in ONE_STAGE else 2
    for count in range(1, 12):
        more = filled(name, count, ranks, ranks * each)
        own = [
            SimpleNamespace(
                stage_index=index, num_stages=ranks * each, group_size=ranks, group_rank=0, is_last=False,
                submod=nn.Linear(1, 1),
            )
            for index in range(each)
        ]  # fmt: skip
        make(name, own, more)  # type: ignore[arg-type]
        if more > count:
            with pytest.raises(ValueError, match="icro"):
                make(name, own, more - 1)  # type: ignore[arg-type]
