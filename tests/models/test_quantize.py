"""Quantised weights: what they hold, what they cost in perplexity, and what stays as it is."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shoal.models.quantize import GROUP, quantize, weight_bytes

WIDTH, INNER, VOCABULARY = 64, 96, 40


def trained(tied: bool) -> tuple[Any, torch.Tensor]:
    """A small Llama that has learnt to count with noise, and tokens [B, T] that it has not seen."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss_of(model, counting(16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), counting(64)


def counting(rows: int) -> torch.Tensor:
    first = torch.randint(VOCABULARY, (rows, 1))
    steps = torch.randint(1, 4, (rows, 23)).cumsum(1)
    return torch.cat([first, first + steps], dim=1) % VOCABULARY


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    return math.exp(loss_of(model, tokens).item())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "near"), [("int8", 0.01), ("int4", 0.1)])
def test_perplexity_and_bytes(kind: str, near: float, tied: bool) -> None:
    model, unseen = trained(tied)
    whole = perplexity(model, unseen)
    assert whole < 8  # of 40 at random
    weights = [m.weight.shape for m in model.model.modules() if isinstance(m, nn.Linear)]
    before, rest = weight_bytes(model), 4 * (model.num_parameters() - sum(shape.numel() for shape in weights))
    assert before == 4 * model.num_parameters()
    quantize(model, kind)
    lost = perplexity(model, unseen) / whole - 1
    assert 0 != lost < near
    scales = {
        "int8": sum(4 * rows for rows, _ in weights),
        "int4": sum(5 * rows * columns // GROUP for rows, columns in weights),
    }
    assert weight_bytes(model) == rest + sum(shape.numel() for shape in weights) + scales[kind]
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert model.generate(unseen[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 8)


@torch.no_grad()
@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_no_weight_is_off_by_more_than_half_a_level(kind: str, levels: int, columns: int) -> None:
    """Differential: against rounding by hand, for each row of int8, and each group or row of int4."""
    torch.manual_seed(1)
    layer = nn.Linear(columns, 8, bias=False)
    exact = layer.weight.clone()
    quantize(nn.Sequential(layer), kind)
    group = columns if kind == "int8" or columns % GROUP else GROUP
    largest = exact.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True)
    off = (layer(torch.eye(columns)).T - exact).unflatten(1, (-1, group)).abs()
    assert (off <= 0.51 * largest / levels).all()
    assert off.max() > 0
