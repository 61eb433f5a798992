"""Attention of a part of a window's queries, block by block: memory grows with the window, not with its square.

A block of queries is held against the keys from the first that any of them may see to the last. Its mask is made when
the block is computed, and again in the backward pass, which computes the block a second time from the queries, keys
and values (Chen et al. 2016, "Training deep nets with sublinear memory cost"): a third more products than keeping the
probabilities, for a mask and scores of [block, T] in place of [T, T].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_TOKENS = 256

# Of queries: which rows, and their places in the window; the keys that they may see.
Block = tuple[slice, range, slice]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Sequence[range],
    documents: Tensor,
    scale: float,
    kept: Tensor | None = None,
) -> Tensor:
    """The heads' outputs [B, heads, Q, D] of the queries [B, heads, Q, D] of the tokens at `places` of a window.

    key and value [B, key heads, T, D] are those of the whole window, `documents` [B, T] its tokens' documents: a
    query sees the keys of its own document up to its own place. Places from T on are padding, and see anything.
    `kept` [B, heads, Q, T] is what dropout multiplies the probabilities by.
    """
    blocks = list(_blocks(places, documents))
    result: Tensor = _Blockwise.apply(query, key, value, documents, kept, blocks, scale)
    return result


def _blocks(places: Sequence[range], documents: Tensor) -> Iterator[Block]:
    length, row = documents.shape[-1], 0
    for place in places:
        for first in range(place.start, place.stop, BLOCK_TOKENS):
            tokens = range(first, min(first + BLOCK_TOKENS, place.stop))
            of_first = documents[:, min(first, length - 1), None]
            begins = int((documents == of_first).int().argmax(-1).min())
            yield slice(row, row + len(tokens)), tokens, slice(begins, min(tokens.stop, length))
            row += len(tokens)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor,
        kept: Tensor | None,
        blocks: list[Block],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, documents, kept)
        ctx.blocks, ctx.scale = blocks, scale
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for block in blocks:
            rows, _, keys = block
            parts = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            out[:, :, rows] = _of_block(parts, block, documents, kept, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, documents, kept = ctx.saved_tensors
        wide = torch.promote_types(key.dtype, torch.float32)
        grads = torch.empty_like(query), *(torch.zeros_like(each, dtype=wide) for each in (key, value))
        for block in ctx.blocks:
            rows, _, keys = block
            with torch.enable_grad():
                views = query[:, :, rows], key[:, :, keys], value[:, :, keys]
                parts = [each.detach().requires_grad_() for each in views]
                out = _of_block(parts, block, documents, kept, ctx.scale)
            found = torch.autograd.grad(out, parts, grad[:, :, rows])
            grads[0][:, :, rows] = found[0]
            grads[1][:, :, keys] += found[1]
            grads[2][:, :, keys] += found[2]
        return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), None, None, None, None


def _of_block(
    parts: Sequence[Tensor], block: Block, documents: Tensor, kept: Tensor | None, scale: float
) -> Tensor:
    (query, key, value), (rows, tokens, keys) = parts, block
    own = torch.arange(tokens.start, tokens.stop, device=query.device).clamp(max=documents.shape[-1] - 1)
    others = torch.arange(keys.start, keys.stop, device=query.device)
    same = documents[:, own, None] == documents[:, None, keys]
    allowed = (same & (own[:, None] >= others))[:, None]
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    if kept is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
    scores = (query @ key.mT * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) * kept[:, :, rows, keys]) @ value
