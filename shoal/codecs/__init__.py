"""Codecs: how tensors are compressed for the wire.

A codec is one file here, and one row of `shoal.config.codecs`, which names the function that makes one from the
options: each option with the codec's own default where it is empty.

To add one: a subclass of `ChunkCodec`, `GatherCodec` or `LinearCodec` (see `shoal.codecs.base`; the class decides how
sums over the ranks are formed, see `shoal.codecs.channel`) with `encode`, `decode` and `nbytes`, a linear one with
`rounds` and `round_bytes`; and with `biased`, which says whether its error has to be fed back. The docstring states
the update rule, its source, its bytes and cost, and when to use it. State goes into `state_dict`. The laws of
tests/codecs/ run on every entry.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from shoal.codecs.base import Codec, Subject
from shoal.codecs.cast import Plain
from shoal.codecs.feedback import ErrorFeedback
from shoal.codecs.momentum import MomentumCorrection
from shoal.codecs.powersgd import RANK, PowerSGD
from shoal.codecs.sparse import Sparse
from shoal.config import StrategyConfig
from shoal.config.codecs import CODECS as HOMES
from shoal.errors import UserError, choose

__all__ = ["CODECS", "Codec", "Subject", "build", "check", "fed_back", "make"]


def _at(home: str) -> Callable[[StrategyConfig, Subject], Codec]:
    module, function = home.split(".")
    found: Callable[[StrategyConfig, Subject], Codec] = getattr(
        import_module(f"{__name__}.{module}"), function
    )
    return found


CODECS = {name: _at(home) for name, home in HOMES.items()}


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
