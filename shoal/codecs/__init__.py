"""Codecs: how tensors are compressed for the wire.

A codec is one file here, one line in `CODECS`, and its name in `shoal.config.strategy.Codec`.

To add one: a subclass of `ChunkCodec`, `GatherCodec` or `LinearCodec` (see `shoal.codecs.base`; the class decides how
sums over the ranks are formed, see `shoal.codecs.channel`) with `encode`, `decode` and `nbytes`, a linear one with
`rounds` and `round_bytes`; and with `biased`, which says whether its error has to be fed back. The docstring states
the update rule, its source, its bytes and cost, and when to use it. State goes into `state_dict`. Then a line in
`CODECS` that makes one from the options, each option with the codec's own default where it is empty. The laws of
tests/codecs/ run on every entry.
"""

from collections.abc import Callable, Sequence

import torch

from shoal.codecs.base import Codec, Subject
from shoal.codecs.cast import Cast, Plain
from shoal.codecs.feedback import ErrorFeedback
from shoal.codecs.momentum import MomentumCorrection
from shoal.codecs.powersgd import RANK, PowerSGD
from shoal.codecs.quantize import BLOCK, Quantizer
from shoal.codecs.sign import Sign
from shoal.codecs.sparse import DENSITY, Density, RandomK, Sparse, TopK, TwoBits
from shoal.config import StrategyConfig
from shoal.errors import UserError, choose

__all__ = ["CODECS", "Codec", "Subject", "build", "check", "fed_back", "make"]

CODECS: dict[str, Callable[[StrategyConfig, Subject], Codec]] = {
    "none": lambda options, subject: Plain(subject.dtype),
    "bf16": lambda options, subject: Cast(subject, torch.bfloat16),
    "fp16": lambda options, subject: Cast(subject, torch.float16),
    "int8": lambda options, subject: Quantizer(subject, 8, options.block or BLOCK, options.stochastic),
    "int4": lambda options, subject: Quantizer(subject, 4, options.block or BLOCK, options.stochastic),
    "sign": lambda options, subject: Sign(subject, options.block or BLOCK, options.error_feedback is False),
    "topk": lambda options, subject: (TwoBits if options.two_bits else TopK)(
        subject, _density(options), options.topk_chunk
    ),
    "randomk": lambda options, subject: RandomK(subject, _density(options), options.error_feedback is False),
    "powersgd": lambda options, subject: PowerSGD(subject, options.rank or RANK),
}


def make(options: StrategyConfig, subject: Subject) -> Codec:
    """The codec that the options name, without feedback. Raises UserError if there is none of that name."""
    return choose("--codec", options.codec, CODECS)(options, subject)


def fed_back(codec: Codec, options: StrategyConfig) -> Codec:
    """`codec` with the momentum or the error feedback of the options; by default with feedback if it is biased."""
    if options.codec_momentum and isinstance(codec, Sparse):
        return MomentumCorrection(codec, options.codec_momentum)
    wanted = codec.biased if options.error_feedback is None else options.error_feedback
    return ErrorFeedback(codec, options.error_decay) if wanted and not isinstance(codec, Plain) else codec


def build(options: StrategyConfig, subject: Subject) -> Codec:
    """A codec, with feedback, for a tensor that one rank sends to another again and again."""
    return fed_back(make(options, subject), options)


def check(options: StrategyConfig, shapes: Sequence[torch.Size]) -> None:
    """Raise UserError where the options make no sense for parameters of these shapes. Called before the launch."""
    if options.codec_momentum and options.error_feedback is False and options.codec in ("topk", "randomk"):
        found = "momentum before a sparse codec is a kind of error feedback"
        raise UserError("--codec-momentum without --error-feedback", found, "leave one of the two out")
    if options.error_decay != 1 and type(build(options, Subject(tuple(shapes)))) is not ErrorFeedback:
        found = f"there is no plain error feedback with {options.codec} here, and only that decays"
        raise UserError(f"--error-decay {options.error_decay:g}", found, "leave it out")
    if options.codec != "powersgd":
        return
    rank = options.rank or RANK
    largest = max((min(shape[0], shape[1:].numel()) for shape in shapes if len(shape) > 1), default=0)
    if rank > largest:
        found = f"the largest matrix of the model has rank {largest}"
        raise UserError(f"--rank {rank}", found, "take a smaller one; 1 to 4 is usual")
    if not PowerSGD(Subject(tuple(shapes)), rank).matrices:
        found = "no matrix of the model would shrink to less than half"
        raise UserError(f"--codec powersgd --rank {rank}", found, "take a smaller rank or another codec")


def _density(options: StrategyConfig) -> Density:
    return Density(options.density or DENSITY, options.codec_warmup)
