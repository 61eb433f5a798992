"""DiLoCo: replicas train alone for many steps, and an outer Nesterov momentum moves what they share.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", algorithm 1. With
`fragments` and `overlap_steps` it is Streaming DiLoCo (Douillard et al. 2025), with `--codec int4` its low-bit outer
gradients, with `--codec topk --two-bits` and no outer momentum SparseLoCo. Use it over slow links: bytes fall by the
steps between two syncs, H. The defaults are the paper's (outer rate 0.7, momentum 0.9), but for H: 30 of Streaming
DiLoCo's 30 to 100 steps.
"""

from shoal.config.strategy import StrategyConfig
from shoal.sync.local import Local
from shoal.sync.outer import Nesterov, Outer

OUTER_RATE = 0.7
OUTER_MOMENTUM = 0.9


class DiLoCo(Local):
    """Local training under an outer Nesterov momentum."""

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        """Always: its momentum is what it is."""
        return True

    def outer(self) -> Outer:
        """A new outer momentum."""
        return self._asked(Nesterov, OUTER_RATE, OUTER_MOMENTUM)
