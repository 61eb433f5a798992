"""The loss that is summed is the one that a model gives of itself; what a trial raises is one line."""

from typing import Any

import pytest
import torch
from families import FAMILIES, GLU, SIZES, WORDS, model_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoal.errors import UserError
from shoal.models import proof
from shoal.models.heads import has_plain_head
from shoal.models.isolation import PADDING, packed_inputs, padded_inputs, real_tokens
from shoal.models.loss import IGNORED, own_loss, summed_cross_entropy

ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_model(family: str) -> None:
    """Of two micro-batches of unequal labels, as transformers weights what it adds: each by its labels."""
    model = model_of(family)
    if family in ROUTED:
        model.config.output_router_logits, model.router_aux_loss_coef = True, 0.7
    how = proof.choose_loss(model, family)
    assert (how == "own") == (family in ROUTED)
    if how == "own" or family == "lstm":
        return
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    with torch.no_grad():
        ours = summed_cross_entropy(model, {"input_ids": ids}, shifted, chunked=how == "chunked")
        torch.testing.assert_close(ours / 46, model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ROUTED)
def test_what_a_router_adds_is_weighted_by_labels_and_counts_no_padding(family: str) -> None:
    model = model_of(family)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.7
    ids = torch.arange(2 * 24).view(2, 24) * 7 % WORDS
    documents = torch.tensor([[0] * 24, [1] * 15 + [PADDING] * 9])
    real = real_tokens(documents)
    labels = ids.where(documents != PADDING, IGNORED)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=real, labels=labels)
        for given in (
            padded_inputs(ids, documents),
            packed_inputs(ids, documents) | {"attention_mask": real},
        ):
            found = own_loss(model, given, shifted)
            torch.testing.assert_close(found, expected.loss * (23 + 14), rtol=1e-5, atol=0)
        plain = summed_cross_entropy(
            model, padded_inputs(ids, documents), shifted, chunked=has_plain_head(model)
        )
        torch.testing.assert_close(found - plain, 0.7 * expected.aux_loss * (23 + 14), rtol=1e-4, atol=0)
        nothing = own_loss(model, padded_inputs(ids, documents * 0 + PADDING), labels * 0 + IGNORED)
    assert nothing == 0


@pytest.mark.parametrize("width", [4, 16, 64])
def test_a_cap_is_seen_at_any_size(width: int) -> None:
    """Also where the scores are so small that it hardly changes them."""
    for family, cap in (("gemma2", 30.0), ("gemma2", None)):
        sizes = SIZES | GLU | {"hidden_size": width, "final_logit_softcapping": cap}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
        assert has_plain_head(model) == (cap is None)


def broken(loss: Any = None, forward: Any = None) -> PreTrainedModel:
    model = model_of("llama")
    if loss is not None:
        model.loss_function = loss
    if forward is not None:
        model.model.forward = forward
    return model


def test_a_loss_that_is_no_sum_over_labels_is_refused() -> None:
    def of_last(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **more: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(
            logits[:, -1], labels[:, 0] if "shift_labels" in more else labels[:, -1]
        )

    with pytest.raises(
        UserError, match=r"--model x: its own loss is .*, not the cross entropy .*; take another"
    ):
        proof.choose_loss(broken(of_last), "--model x")


@pytest.mark.parametrize("error", [ValueError("\n\n too many\nvalues"), KeyError("k"), AssertionError()])
def test_what_a_trial_raises_is_one_line(error: Exception) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise error

    with pytest.raises(UserError) as raised, proof.trial("--model x", proof.remedy(packing=True)):
        proof.choose_loss(broken(forward=forward), "--model x")
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith("--model x: a forward pass on trial fails (")
    assert line.endswith("; add --no-packing, or take another model")
    assert type(error).__name__ in line
    assert ("too many" in line) == isinstance(error, ValueError)


def test_the_proof_by_a_loss_finds_a_leak() -> None:
    """As of a model that is cut: only the sum over labels is known there."""
    for leak in (False, True):
        model = model_of("opt")

        def loss(inputs: dict[str, torch.Tensor], model: Any = model, leak: bool = leak) -> torch.Tensor:
            documents = inputs["documents"] * (0 if leak else 1)
            return summed_cross_entropy(
                model, packed_inputs(inputs["input_ids"], documents), inputs["labels"]
            )

        if leak:
            with pytest.raises(UserError, match="sees the one before it"):
                proof.check_loss(loss, model, "x", 32, packing=True, dtype=torch.float32)
        else:
            proof.check_loss(loss, model, "x", 32, packing=True, dtype=torch.float32)


def test_the_second_document_is_longer_than_a_sliding_window() -> None:
    model = model_of("mistral")
    for tokens in (2, 3, 9, 10, 12, 32, 300):
        first = proof._first_document(model, tokens)
        assert 1 <= first < tokens
        assert tokens - first > min(8, tokens - 2)
