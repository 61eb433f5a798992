"""Packed documents do not see each other, in every family; the halves of a model make the whole."""

import itertools
from collections.abc import Callable

import pytest
import torch
from families import CANNOT_PACK, FAMILIES, WORDS, model_of
from transformers import (
    AttentionMaskInterface,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.errors import UserError
from shoal.models import attention, isolation, lstm
from shoal.models.heads import final_hidden, has_plain_head, logits
from shoal.models.isolation import PADDING, document_positions, documents_apart, packed_inputs, padded_inputs
from shoal.models.loss import summed_cross_entropy
from shoal.models.proof import check_hidden

SCALED_OR_CAPPED = {"gemma2", "granite", "cohere"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_sees_another(family: str) -> None:
    """Each document alone gives the logits it gives within a packed window, longer than a sliding one."""
    model = model_of(family)
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 18, [3] * 24])
    check_hidden(model, family, 32, packing=True, dtype=torch.float32)
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


@pytest.mark.parametrize("family", CANNOT_PACK)
def test_a_family_that_cannot_pack_takes_one_document_a_row(family: str) -> None:
    """Packing is refused, and what to do is said; padding behind a document changes nothing of it."""
    model = model_of(family)
    with pytest.raises(UserError, match=r"family X: a document in a packed window .*; add --no-packing"):
        check_hidden(model, "family X", 32, packing=True, dtype=torch.float32)
    check_hidden(model, family, 32, packing=False, dtype=torch.float32)
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    documents = torch.tensor([[0] * 9 + [PADDING] * 15, [PADDING] * 24])
    with torch.no_grad():
        found = logits(model, padded_inputs(ids, documents))
        torch.testing.assert_close(found[:1, :9], model(input_ids=ids[:1, :9]).logits, rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()


def leaky(family: str, how: str) -> tuple[PreTrainedModel, pytest.MonkeyPatch]:
    """A model of which one thing is wrong."""
    broken, model = pytest.MonkeyPatch(), model_of(family)
    if how == "masks":
        broken.setattr(isolation._Forward, "__setattr__", lambda self, name, value: None)
    if how == "positions":
        broken.setattr(
            isolation, "document_positions", lambda documents: torch.arange(documents.shape[1])[None]
        )
    if how == "a token of the past":
        model.get_input_embeddings().register_forward_hook(lambda _, ids, made: made + made.roll(1, dims=1))
    if how == "a token to come":
        model.get_input_embeddings().register_forward_hook(lambda _, ids, made: made + made.roll(-1, dims=1))
    return model, broken


@pytest.mark.parametrize(
    ("family", "how", "found"),
    [
        ("opt", "masks", "sees the one before"),
        ("gpt2", "positions", "not computed as it is alone"),
        ("llama", "a token of the past", "sees the one before"),
        ("llama", "a token to come", "reads ahead"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_refused(family: str, how: str, found: str, dtype: torch.dtype) -> None:
    model, broken = leaky(family, how)
    try:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            pytest.raises(UserError, match=f"here.*{found}"),
        ):
            check_hidden(model, "here", 32, packing=True, dtype=dtype)
    finally:
        broken.undo()


def test_mask_and_positions_by_the_definition() -> None:
    documents = torch.tensor([[4, 4, 5, 6, 6, 6], [6, 6, 6, 6, 7, 7]])
    positions = document_positions(documents)
    with documents_apart((2, 6), documents):
        mask = AttentionMaskInterface()["sdpa"](batch_size=2, q_length=6, kv_length=6)
    for row, query, key in itertools.product(range(2), range(6), range(6)):
        same = documents[row, query] == documents[row, key]
        assert bool(mask[row, 0, query, key]) == bool(same and key <= query)
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert packed_inputs(documents, documents * 0)["documents"] is None


def test_a_compiled_body_has_no_graph_break() -> None:
    model = model_of("llama")
    ids = torch.arange(24).view(1, 24) % WORDS
    inputs = packed_inputs(ids, ids // 10)
    compiled = torch.compile(final_hidden, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(model, inputs), final_hidden(model, inputs))
    torch.compile(summed_cross_entropy, fullgraph=True, backend="eager")(model, inputs, ids).backward()


def test_the_lstm_is_registered() -> None:
    assert isinstance(model_of("lstm"), lstm.LstmForCausalLM)
