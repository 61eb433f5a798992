"""The two halves of a causal language model: the body that makes hidden states, the head that makes logits.

They are used apart so that the loss can be taken in chunks, with logits never whole in memory.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 4


class Vocabulary(Protocol):
    """The part of an output embedding that this process holds; others, with the same hidden states, hold the rest."""

    first: int  # of its rows

    def gather(self, numbers: Tensor) -> Tensor:
        """What each of them has found, [...]: [ranks, ...]."""
        ...

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of what they have found, in place."""
        ...


def final_hidden(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """The body's final hidden states [B, T, H] for the inputs of `isolation.packed_inputs`."""
    return model.base_model(**_fit(model, inputs)).last_hidden_state


def logits(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """The logits [B, T, V], whole, for the inputs of `isolation.packed_inputs`."""
    return model(**_fit(model, inputs)).logits


def head(model: "PreTrainedModel") -> tuple[Tensor, Tensor | None]:
    """The output embedding: its weight [V, H] and bias [V] or None."""
    layer = model.get_output_embeddings()
    return layer.weight, layer.bias


def vocabulary(model: "PreTrainedModel") -> Vocabulary | None:
    """Which rows of the output embedding are here; None: all of them."""
    return getattr(model.get_output_embeddings(), "vocabulary", None)


@torch.no_grad()
def has_plain_head(model: "PreTrainedModel") -> bool:
    """Whether logits are nothing but the linear head of the hidden states, as the chunked loss has it.

    Families that scale or cap their logits (Gemma 2, Cohere, Granite, ...) are found by trying, not by name.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or model.base_model is model:  # it has no body that could run alone
        return False
    was_training = model.training
    model.eval()
    ids = torch.arange(PROBE_TOKENS, device=layer.weight.device)[None]
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": None}
    whole, parts = logits(model, inputs), layer(final_hidden(model, inputs))
    model.train(was_training)
    return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-4, atol=1e-5)


def _fit(model: "PreTrainedModel", inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as this model's attention takes them."""
    mask, config = inputs["attention_mask"], model.config
    sliding = getattr(config, "sliding_window", None)
    if sliding is not None and inputs["input_ids"].shape[1] > sliding:
        mask = (
            None  # only the model knows which layers slide; it tells documents apart by restarting positions
        )
    if mask is not None and config._attn_implementation == "eager":  # which adds its mask to the scores
        blocked = torch.finfo(model.dtype).min
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, blocked)
    return {**inputs, "attention_mask": mask, "use_cache": False}
