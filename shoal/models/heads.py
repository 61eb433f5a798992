"""The two halves of a causal language model: the body that makes hidden states, the head that makes logits.

They are used apart so that the loss can be taken in chunks, with logits never whole in memory.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from shoal.models.isolation import documents_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 4
LOUD = 100.0  # scores that every cap cuts


class Vocabulary(Protocol):
    """The part of an output embedding that this process holds; others, with the same hidden states, hold the rest."""

    first: int  # of its rows

    def gather(self, numbers: Tensor) -> Tensor:
        """Gather [...] from each rank: [ranks, ...]."""
        ...

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        ...


def final_hidden(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """The body's final hidden states [B, T, H] for the inputs of `isolation.packed_inputs` or `padded_inputs`."""
    return forward(model.base_model, inputs).last_hidden_state


def logits(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """The logits [B, T, V], whole, for the same inputs."""
    return forward(model, inputs).logits


def forward(part: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    """What a model or its body gives for these inputs, with the documents in them kept apart."""
    given = {name: value for name, value in inputs.items() if name != "documents"}
    rows, length = inputs["input_ids"].shape
    with documents_apart((rows, length), inputs.get("documents")):
        return part(**given, **more, use_cache=False)


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

    Families that scale or cap their logits (Gemma 2, Cohere, Granite, ...) are found by trying, not by name: the head
    is made to give large random scores, of which the model has to make exactly these logits. A cap changes them at
    any size of the model; that of its own scores might not show.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or model.base_model is model:  # it has no body that could run alone
        return False
    entered, scores = [], []

    def shout(_: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
        entered.append(args[0])
        scores.append(LOUD * torch.randn(made.shape, generator=draw).to(made))
        return scores[-1]

    draw = torch.Generator().manual_seed(0)
    was_training = model.training
    inputs = {"input_ids": torch.arange(PROBE_TOKENS, device=layer.weight.device)[None]}
    hook = layer.register_forward_hook(shout)
    try:
        whole, hidden = logits(model.eval(), inputs), final_hidden(model, inputs)
    finally:
        hook.remove()
        model.train(was_training)
    plain = (
        len(scores) == 1 and whole.shape == scores[0].shape and torch.equal(whole.to(scores[0]), scores[0])
    )
    return (
        plain
        and entered[0].shape == hidden.shape
        and torch.allclose(entered[0], hidden, rtol=1e-4, atol=1e-5)
    )
