"""Documents packed into one window do not see each other: positions that restart, and masks that end at a document.

A family makes its masks itself, one for each kind of layer (causal, sliding, chunked): all through the functions that
transformers keeps by the name of the attention. While `documents_apart`, these functions also forbid a query to look
at another document. So a sliding window stays as wide as the family has it, and no family needs a case of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import and_masks, causal_mask_function, eager_mask, sdpa_mask

Mask = Callable[..., Tensor | None]
PADDING = -1  # the document of a token that fills up a row


@dataclass
class _Forward:
    """The forward pass that runs now: the shape of its windows, and their documents [B, T] if there are several."""

    shape: tuple[int, int] | None = None
    documents: Tensor | None = None


_now = _Forward()


@contextmanager
def documents_apart(shape: tuple[int, int], documents: Tensor | None) -> Iterator[None]:
    """Make masks within the block keep the `documents` [B, T] of windows of `shape` [B, T] apart.

    None: each row is one document. Padding stands on the right, where no token sees it: masks leave it out.
    """
    _now.shape, _now.documents = shape, documents
    try:
        yield
    finally:
        _now.shape, _now.documents = None, None


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
    """The inputs of `heads` for packed windows: input_ids, position_ids and documents, int64 [B, T] each.

    The documents are None when no window holds a boundary: plain causal attention then isolates already. A compiled
    graph cannot ask that of its data, and has them always.

    Of a part of each window, which comes with its `position_ids`, `documents` are those of the whole window. They
    stand as attention_mask [B, 1, 1, T], for an attention that knows which part it is.
    """
    if position_ids is not None:
        mask = documents[:, None, None]
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}
    bounded = torch.compiler.is_compiling() or bool((documents[:, 1:] != documents[:, :-1]).any())
    return {
        "input_ids": input_ids,
        "position_ids": document_positions(documents),
        "documents": documents if bounded else None,
    }


def padded_inputs(input_ids: Tensor, documents: Tensor) -> dict[str, Tensor | None]:
    """The inputs of `heads` for rows [B, T] of one document each: input_ids, and attention_mask, 0 at padding."""
    return {"input_ids": input_ids, "attention_mask": real_tokens(documents)}


def real_tokens(documents: Tensor) -> Tensor:
    """1 where a token is no padding, int64 [B, T]. A row of padding has one: attention to nothing is not a number."""
    real = documents != PADDING
    real[:, 0] |= ~real.any(dim=1)
    return real.long()


def _apart(make: Mask) -> Mask:
    """A mask function that follows the forward pass that runs now."""

    def masks(
        *args: Any,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        allow_is_causal_skip: bool = True,
        **options: Any,
    ) -> Tensor | None:
        if _now.shape is not None:
            attention_mask = None
            rows, length = _now.shape  # of hidden states a rank of a team may hold a part
            options |= {"batch_size": rows, "q_length": length, "kv_length": length}
        documents = _now.documents
        if documents is not None:

            def same(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return documents[row, query] == documents[row, key]

            mask_function, allow_is_causal_skip = and_masks(mask_function, same), False
        return make(
            *args,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            **options,
        )

    return masks


def register(name: str, make: Mask = sdpa_mask) -> None:
    """Have the masks of the attention called `name`, which `make` makes, keep documents apart."""
    AttentionMaskInterface.register(name, _apart(make))


register("sdpa")
register("eager", eager_mask)
