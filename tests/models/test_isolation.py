"""Packed documents do not see each other, in every family; the halves of a model make the whole."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.errors import UserError
from shoal.models import attention, isolation, lstm
from shoal.models.heads import final_hidden, has_plain_head, logits
from shoal.models.isolation import check_isolation, document_mask, document_positions, packed_inputs
from shoal.models.loss import summed_cross_entropy

WORDS = 61
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
GLU = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | GLU,
    "gpt2": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "qwen2": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": SIZES | GLU,
    "mistral": SIZES | GLU | {"sliding_window": 8},
    "gemma": SIZES | GLU,
    "gemma2": SIZES | GLU,
    "gemma3_text": SIZES
    | GLU
    | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": SIZES | {"intermediate_size": 48},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "lstm": {"vocab_size": WORDS, "hidden_size": 32},
}
SCALED_OR_CAPPED = {"gemma2"}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    attention.use_fastest(model)
    for parameter in model.parameters():  # large enough that a leak shows
        parameter.data.mul_(3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_sees_another(family: str) -> None:
    """Each document alone gives the logits it gives within a packed window."""
    model = model_of(family)
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 18, [3] * 24])
    check_isolation(model)
    with torch.no_grad():
        packed = logits(model, packed_inputs(ids, documents))
        for row, start, stop in [(0, 0, 5), (0, 5, 6), (0, 6, 24), (1, 0, 24)]:
            part = ids[row : row + 1, start:stop]
            alone = model(input_ids=part).logits
            torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_attention_by_products_is_attention(family: str) -> None:
    """In bf16, ours agrees with torch's kernel as well as that agrees with float32; the gradients too."""
    model = model_of(family)
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    for documents in (torch.tensor([[0] * 9 + [1] * 15, [2] * 24]), torch.zeros(2, 24, dtype=torch.long)):
        check_kernel(model, lambda each=documents: summed_cross_entropy(model, packed_inputs(ids, each), ids))


def test_attention_by_products_adds_a_position_bias() -> None:
    """And its gradient is that of torch's kernel, with a mask and without; keys of an encoder are fewer."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))
    attention.use_fastest(model)
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    read = {"input_ids": ids[:, :20], "labels": ids}
    for mask in (torch.arange(20) < torch.tensor([[12], [20]]), None):
        check_kernel(model, lambda each=mask: model(**read, attention_mask=each).loss)


def check_kernel(model: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> None:
    """The gradients of a loss are those of torch's kernel, in bf16 within twice its rounding."""
    found = {}
    for name, bf16 in itertools.product(("sdpa", attention.NAME), (True, False)):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss().backward()
        found[name, bf16] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    exact = found["sdpa", False]
    torch.testing.assert_close(found[attention.NAME, False], exact)
    rounding = (found["sdpa", True] - exact).norm()
    assert 0 < (found[attention.NAME, True] - exact).norm() < 2 * rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_make_the_model(family: str) -> None:
    model = model_of(family)
    assert has_plain_head(model) == (family not in SCALED_OR_CAPPED)
    ids = torch.arange(24).view(1, 24) % WORDS
    inputs = packed_inputs(ids, ids // 10)
    if has_plain_head(model):
        chunked, whole = (summed_cross_entropy(model, inputs, ids, chunked=each) for each in (True, False))
        torch.testing.assert_close(chunked, whole)


def test_a_leak_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "document_mask", lambda documents: document_mask(documents * 0))
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*sees the one before"):
        check_isolation(model_of("llama"))


def test_mask_and_positions_by_the_definition() -> None:
    documents = torch.tensor([[4, 4, 5, 6, 6, 6], [6, 6, 6, 6, 7, 7]])
    mask, positions = document_mask(documents), document_positions(documents)
    for row, query, key in itertools.product(range(2), range(6), range(6)):
        same = documents[row, query] == documents[row, key]
        assert bool(mask[row, 0, query, key]) == bool(same and key <= query)
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert packed_inputs(documents, documents * 0)["attention_mask"] is None


def test_a_compiled_body_has_no_graph_break() -> None:
    model = model_of("llama")
    ids = torch.arange(24).view(1, 24) % WORDS
    inputs = packed_inputs(ids, ids // 10)
    compiled = torch.compile(final_hidden, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(model, inputs), final_hidden(model, inputs))
    torch.compile(summed_cross_entropy, fullgraph=True, backend="eager")(model, inputs, ids).backward()


def test_the_lstm_is_registered() -> None:
    assert isinstance(model_of("lstm"), lstm.LstmForCausalLM)
