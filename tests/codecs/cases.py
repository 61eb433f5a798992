"""Every codec with options that a small tensor shows, and tensors to try them on."""

from typing import Any

import torch
from torch import Tensor

from shoal.codecs import CODECS, Codec, Subject, make
from shoal.config import StrategyConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {},
    "fp16": {},
    "int8": {"block": 16},
    "int4": {"block": 16},
    "sign": {"block": 16},
    "topk": {"density": 0.1},
    "randomk": {"density": 0.1},
    "powersgd": {"rank": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16, fed back": {"codec": "bf16", "error_feedback": True},
    "int8, stochastic": {"codec": "int8", "block": 16, "stochastic": True},
    "int4, one block": {"codec": "int4"},
    "sign, vote": {"codec": "sign", "block": 16, "error_feedback": False},
    "sign, momentum": {"codec": "sign", "block": 16, "codec_momentum": 0.9, "codec_warmup": 2},
    "topk, DGC": {"codec": "topk", "density": 0.1, "codec_momentum": 0.9, "codec_warmup": 3},
    "topk, 2 bits": {"codec": "topk", "density": 0.1, "two_bits": True},
    "topk, in chunks": {"codec": "topk", "density": 0.1, "topk_chunk": 64},
    "topk, SparseLoCo": {
        "codec": "topk",
        "density": 0.1,
        "topk_chunk": 64,
        "two_bits": True,
        "error_decay": 0.95,
    },
    "topk, all": {"codec": "topk", "density": 1.0},
    "randomk, unbiased": {"codec": "randomk", "density": 0.1, "error_feedback": False},
    "powersgd, late": {"codec": "powersgd", "rank": 1, "codec_warmup": 2},
}
CASES = {name: StrategyConfig(codec=name, **options) for name, options in OPTIONS.items()} | {
    name: StrategyConfig(**options) for name, options in VARIANTS.items()
}
SHAPES = ((20, 12), (7,), (3, 5, 6), (), (4, 4))  # 354 elements: divide by none of 4, 8, 16
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 64, 65, 354]


def options_of(codec: str, **more: Any) -> StrategyConfig:
    """The codec with options that a small tensor shows."""
    return StrategyConfig(**{"codec": codec, **OPTIONS[codec], **more})


def subject(numel: int | None = None, dtype: torch.dtype = torch.float64, **more: Any) -> Subject:
    """A tensor of `SHAPES`, or a vector."""
    shapes = SHAPES if numel is None else ((numel,),)
    return Subject(tuple(map(torch.Size, shapes)), dtype, **more)


def codec_of(options: StrategyConfig, numel: int, dtype: torch.dtype = torch.float64, **more: Any) -> Codec:
    """The bare codec, for `SHAPES` where their elements are as many."""
    whole = subject(dtype=dtype, **more)
    return make(options, whole if whole.numel == numel else subject(numel, dtype, **more))


def values(numel: int, *seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Seeded numbers of both signs and unlike sizes."""
    number = sum(part * 1009**place for place, part in enumerate(seed))
    generator = torch.Generator().manual_seed(number)
    normal = torch.randn(numel, generator=generator, dtype=torch.float64)
    uneven = torch.rand(numel, generator=generator, dtype=torch.float64)
    return (normal * uneven**2 * scale).to(dtype)


assert OPTIONS.keys() == CODECS.keys(), "every codec is in the table of its laws"
