"""Attention block by block against attention whole, and how much it holds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.layouts.context import chunks
from shoal.models import blockwise


def document_mask(documents: Tensor) -> Tensor:
    """Who may look at whom, bool [B, 1, T, T]: causal, and within one document."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def drawn(heads: int, key_heads: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 4), (2, key_heads, length, 4), (2, key_heads, length, 6)]
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [12, 19])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_parts_of_all_ranks_are_attention_whole(
    ranks: int, length: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_TOKENS", 3)
    documents = (torch.rand(2, length, generator=torch.Generator().manual_seed(ranks)) < 0.2).cumsum(-1)
    kept = torch.dropout(torch.ones(2, 4, length, length, dtype=torch.float64), dropout, train=True)
    query, key, value = inputs = drawn(4, 2, length)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.7
    seen = scores.masked_fill(~document_mask(documents), float("-inf")).softmax(-1)
    whole = (seen * kept) @ value.repeat_interleave(2, dim=1)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((whole * weights).sum(), inputs)

    total = torch.zeros((), dtype=torch.float64)
    for rank in range(ranks):
        places = chunks(rank, ranks, length)
        own = torch.cat([torch.arange(place.start, place.stop) for place in places])
        at = own.clamp(max=length - 1)
        noise = kept[:, :, at] if dropout else None
        part = blockwise.attend(query[:, :, at], key, value, places, documents, 0.7, noise)
        real = own < length
        torch.testing.assert_close(part[:, :, real], whole[:, :, at[real]], rtol=1e-11, atol=1e-12)
        total = total + (part * weights[:, :, at] * real[:, None]).sum()
    for found, exact in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return made


def held(length: int) -> tuple[int, int]:
    """The bytes that a rank of two keeps for the backward pass, and of the largest tensor in both passes."""
    query, key, value = drawn(2, 1, length, torch.float32)
    documents = torch.arange(length).expand(2, -1) // (length // 2)  # the second begins in the middle
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = query[:, :, : length // 2]
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = blockwise.attend(own, key, value, chunks(0, 2, length), documents, 1.0)
        out.sum().backward()
    return sum(kept.values()), largest.nbytes


def test_memory_grows_with_the_window_not_with_its_square() -> None:
    short, long = held(1024), held(4096)
    assert long[0] <= 4.01 * short[0]
    assert long[1] <= 4.01 * short[1]


def test_attention_whole_would_be_found() -> None:
    """The test above can fail: scores of a whole window grow with its square."""
    sizes = []
    for length in (256, 1024):
        query, key, _ = drawn(2, 2, length, torch.float32)
        with Largest() as largest:
            F.softmax(query @ key.mT, -1).sum().backward()
        sizes.append(largest.nbytes)
    assert sizes[1] > 15 * sizes[0]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_rank_looks_at_equally_many_pairs(ranks: int) -> None:
    for length in (2 * ranks, 64 * ranks, 64 * ranks - 5):
        pairs = [
            sum(place + 1 for part in chunks(rank, ranks, length) for place in part if place < length)
            for rank in range(ranks)
        ]
        padding = -length % (2 * ranks)
        assert sum(pairs) == length * (length + 1) // 2
        assert max(pairs) - min(pairs) <= padding * (length + padding)
