"""Codecs: what compression does to a tensor on the wire.

A codec is one file here, one line in `CODECS`, and its name in `shoal.config.strategy.Codec`.

To add one: a class with `combine`, `encode`, `decode` and `nbytes` (see `shoal.codecs.base.Codec`), and a
`biased` that says whether its error has to be fed back; in its docstring the update rule, its source, its bytes
and its cost, and when to use it. `combine` decides how sums are formed (see `shoal.codecs.sums`): a
"linear" one also has `rounds` and `round_bytes`. What it remembers goes into `state_dict`. Then a line in
`CODECS` that makes one from the options, each option with the codec's own default where it is empty. The laws
of tests/codecs/ run on every entry.
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
    """With the momentum or the error feedback that the options ask for; by default with feedback if it is biased."""
    if options.codec_momentum and isinstance(codec, Sparse):
        return MomentumCorrection(codec, options.codec_momentum)
    wanted = codec.biased if options.error_feedback is None else options.error_feedback
    return ErrorFeedback(codec, options.error_decay) if wanted and codec.combine != "dense" else codec


def build(options: StrategyConfig, subject: Subject) -> Codec:
    """What encodes a tensor that is sent from one rank to another, again and again."""
    return fed_back(make(options, subject), options)


def check(options: StrategyConfig, shapes: Sequence[torch.Size]) -> None:
    """Refuse, before anything is launched, what makes no sense for a model of parameters with these shapes."""
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
