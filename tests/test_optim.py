"""The update: torch's optimizers over the right parameters, a rate for each step, and state by name."""

import copy
import math

import pytest
import torch
from laws.rows import Net
from torch import nn

from shoal.optim.optimizers import Hyperparameters, NamedState, build, learning_rate


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def take_steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], seeds: range) -> None:
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name: str) -> None:
    model = Net("plain", 0.0)
    groups = [g for o in build(name, named(model), Hyperparameters(0.1, 0.3)) for g in o.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.dim() >= 2 else 0.0)


def test_muon_takes_hidden_matrices_and_leaves_the_embeddings() -> None:
    model = Net("plain", 0.0)
    muon, adamw = build("muon", [(n.replace("head", "lm_head"), p) for n, p in named(model)],
                        Hyperparameters(0.1, 0.0))  # fmt: skip
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    hidden = {id(p) for group in muon.param_groups for p in group["params"]}
    assert hidden == {id(model.up.weight), id(model.down.weight)}


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_state_that_was_taken_and_put_back_goes_on_bit_for_bit(name: str) -> None:
    first = Net("tied", 0.0)
    optimizers = build(name, named(first), Hyperparameters(0.05, 0.1))
    take_steps(first, optimizers, range(5))
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in NamedState(optimizers, named(first)).tensors():
        param, part = key.rsplit("/", 1)
        assert param in dict(named(first))
        kept.setdefault(param, {})[part] = tensor.clone()
    second = copy.deepcopy(first)
    others = build(name, named(second), Hyperparameters(0.05, 0.1))
    NamedState(others, named(second)).load(lambda param: kept.get(param, {}))
    take_steps(first, optimizers, range(5, 9))
    take_steps(second, others, range(5, 9))
    for (key, a), (_, b) in zip(named(first), named(second), strict=True):
        assert torch.equal(a, b), key


KINDS = ("cosine", "linear", "constant")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10, 0.1, 0.03])
def test_the_rate_rises_to_its_peak_and_never_exceeds_it(kind: str, warmup: float) -> None:
    rates = [learning_rate(s, peak=2.0, total_steps=100, warmup_steps=warmup, kind=kind) for s in range(100)]
    steps = round(warmup * 100) if warmup < 1 else int(warmup)
    assert rates[: steps + 1] == sorted(rates[: steps + 1])
    assert max(rates) == rates[max(0, steps - 1)] == 2.0
    assert rates[steps:] == sorted(rates[steps:], reverse=True)
    assert min(rates) > 0
    assert (rates[-1] == 2.0) == (kind == "constant")


def test_the_rate_against_the_formula_of_each_schedule() -> None:
    at = lambda step, kind: learning_rate(step, peak=1.0, total_steps=110, warmup_steps=10, kind=kind)  # noqa: E731
    assert at(4, "linear") == 0.5
    assert at(60, "linear") == pytest.approx(0.5)
    assert at(60, "cosine") == pytest.approx(0.5)
    assert at(35, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert at(109, "linear") == pytest.approx(0.01)


def test_a_run_of_one_step_learns() -> None:
    for kind in KINDS:
        assert learning_rate(0, peak=1.0, total_steps=1, warmup_steps=0.03, kind=kind) == 1.0
        assert learning_rate(0, peak=1.0, total_steps=1, warmup_steps=1, kind=kind) == 1.0
