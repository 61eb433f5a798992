"""Attention by three matrix products: for short bf16 windows on a CPU, where a flash kernel is slower.

Forward and backward on one core with AMX took 24 ms against 40 ms at [8, 4, 256, 64], and 34 against 56 at
[4, 4, 512, 64]; above 512 tokens, or in float32, torch's own kernel takes over. With it the scores
take memory linear in the window; a window of several documents still has a mask, of one byte for each pair of its
tokens, once for each kind of layer. `blockwise` needs none, and computes a third more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shoal.models import isolation

NAME = "shoal"
MOST_TOKENS = 512
HEADS = "part_of_heads"  # on a module that holds a part of the heads: which, of how many


def use_fastest(model: PreTrainedModel) -> None:
    """Let a model whose attention is torch's own choose by window and dtype; any other keeps what it has."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.register_forward_hook(_in_compute_dtype)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Heads' outputs [B, T, heads, D] of query [B, heads, T, D], key and value [B, key heads, T, D].

    `attention_mask` [B, 1, T, T] is true where a query may look, None is causal; `position_bias` [1, heads, T, T] is
    added to the scores. Of a part of the heads the dropout is that of all heads together, and its kernel therefore
    ours; there keys and values may be of another length.
    """
    kind = query.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    short = query.shape[2] == key.shape[2] <= MOST_TOKENS
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    causal = attention_mask is None and options.get("is_causal") is not False and module.is_causal
    part = getattr(module, HEADS, (0, 1))
    draws = dropout > 0 and part != (0, 1)
    if not draws and not (kind == "cpu" and compute == torch.bfloat16 and short and (masked or causal)):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **options,
        )
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril() if causal else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(kind, enabled=False):
        bias = _additive(attention_mask, position_bias, compute)
        out = _by_products(query.to(compute), key.to(compute), value.to(compute), bias, dropout, scale, part)
    return out.transpose(1, 2).contiguous(), None


def _in_compute_dtype(module: nn.Module, inputs: Any, turned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cosines and sines of positions, in the dtype of the queries and keys that they rotate.

    In float32 they would widen every query and key to be narrowed again: 10 % of a step. The angles stay float32.
    """
    plain = isinstance(turned, tuple) and all(each.is_floating_point() for each in turned)
    narrow = plain and turned[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return tuple(each.to(torch.get_autocast_dtype("cpu")) for each in turned) if narrow else turned


def _additive(allowed: Tensor, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias added to the scores; the least number of the dtype where a query may not look."""
    least = torch.finfo(dtype).min
    if position_bias is None:
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, least)
    return position_bias.to(dtype).masked_fill(~allowed, least)


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, scale: float, part: tuple[int, int]
) -> Tensor:
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    bias = bias.expand(batch, heads, length, k.shape[2]).flatten(0, 1)
    # The mask is what the product is added to: one pass over the scores less, forward and backward.
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
    seen = _dropped(scores.softmax(-1), heads, dropout, part)
    return (seen @ v.flatten(0, 1)).unflatten(0, (batch, heads))


def _dropped(seen: Tensor, heads: int, dropout: float, part: tuple[int, int]) -> Tensor:
    """Dropout over [B * heads, T, T], with the masks drawn as if all heads were on this rank."""
    if not dropout or part == (0, 1):
        return F.dropout(seen, dropout)
    shape = (len(seen) // heads, heads, *seen.shape[1:])
    return seen * kept(seen, shape, dropout, part).flatten(0, 1)


def kept(like: Tensor, shape: Sequence[int], dropout: float, part: tuple[int, int]) -> Tensor:
    """The dropout factors of a `part` of the heads, `shape` [B, heads, Q, T], drawn as for all heads.

    In the dtype of `like`, and where that is.
    """
    index, parts = part
    batch, heads, *scores = shape
    drawn = torch.dropout(like.new_ones(batch, parts * heads, *scores), dropout, train=True)
    return drawn[:, index * heads : (index + 1) * heads]


AttentionInterface.register(NAME, attention_forward)
isolation.register(NAME)
