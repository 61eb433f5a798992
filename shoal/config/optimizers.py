"""The table of optimizers: what each one is, as data. Whatever depends on an optimizer, and is none, asks here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerTraits:
    """What an optimizer keeps, needs and allows."""

    aliases: tuple[str, ...] = ()
    # What it keeps of every parameter: AdamW's two moments, which others with the same can take up; or its own.
    keeps: Literal["two moments", "its own"] = "its own"
    in_codes: bool = False  # whether it keeps them in 8 bits
    whole_matrices: bool = False  # whether it needs them: then no replica can be cut
    rounds_by_chance: bool = False  # whether it can train parameters in bfloat16
    # Who takes the momentum: the optimizer, the codec if it is asked to, or the codec always.
    momentum: Literal["own", "own or the codec's", "the codec's"] = "own"


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(
        ("adamw_torch", "adamw_torch_fused", "adam"), keeps="two moments", rounds_by_chance=True
    ),
    "adamw-8bit": OptimizerTraits(
        ("adamw_8bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw8bit"), keeps="two moments", in_codes=True
    ),
    "muon": OptimizerTraits(whole_matrices=True),
    "sgd": OptimizerTraits(momentum="own or the codec's"),
    "onebit-adam": OptimizerTraits(keeps="two moments", momentum="the codec's"),
}
OPTIMIZER_ALIASES = {alias: name for name, traits in OPTIMIZERS.items() for alias in traits.aliases}
