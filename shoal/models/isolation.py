"""Documents packed into one window do not see each other: the mask, the positions, and the proof."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 16


def document_mask(documents: Tensor) -> Tensor:
    """Who may look at whom: causal, and within one document only.

    `documents` int [B, T] names the document of each token; returns bool [B, 1, T, T], true where the query
    (third dim) may attend to the key (fourth dim).
    """
    length = documents.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & causal


def document_positions(documents: Tensor) -> Tensor:
    """Positions that restart at each document: int64 [B, T] from the document ordinals [B, T].

    A window that begins within a document counts from its own first token.
    """
    index = torch.arange(documents.shape[-1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def packed_inputs(
    input_ids: Tensor, documents: Tensor, position_ids: Tensor | None = None
) -> dict[str, Tensor | None]:
    """The model's inputs for packed windows: input_ids, position_ids [B, T] and attention_mask [B, 1, T, T].

    The mask is None when no window holds a boundary: plain causal attention then isolates already. A compiled
    graph cannot ask that of its data, and has the mask always.

    Of a part of each window, which comes with its `position_ids`, the mask is the `documents` of the whole window,
    as [B, 1, 1, T]: for an attention that knows which part it is.
    """
    if position_ids is not None:
        mask = documents[:, None, None]
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}
    bounded = torch.compiler.is_compiling() or bool((documents[:, 1:] != documents[:, :-1]).any())
    return {
        "input_ids": input_ids,
        "position_ids": document_positions(documents),
        "attention_mask": document_mask(documents) if bounded else None,
    }


@torch.no_grad()
def check_isolation(model: "PreTrainedModel") -> None:
    """Prove on one window of two documents that the second does not see the first.

    Raises UserError naming the model class if altering the first document moves the second's hidden states.
    """
    from shoal.models.heads import final_hidden

    device = next(model.parameters()).device
    half = PROBE_TOKENS // 2
    documents = torch.arange(PROBE_TOKENS, device=device)[None] // half
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    altered = ids.clone()
    altered[:, :half] = (ids[:, :half] + half) % model.config.vocab_size

    was_training = model.training
    model.eval()
    before, after = (final_hidden(model, packed_inputs(each, documents))[:, half:] for each in (ids, altered))
    model.train(was_training)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"--model {type(model).__name__}",
            "a document in a packed window sees the one before it",
            "choose a model that takes position_ids and a 4-D attention mask (llama, gpt2, qwen, lstm, ...)",
        )
