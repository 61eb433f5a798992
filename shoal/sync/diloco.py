"""DiLoCo: replicas train alone for many steps, and an outer Nesterov momentum moves what they share.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", algorithm 1. With
`fragments` and `overlap_steps` it is Streaming DiLoCo (Douillard et al. 2025), with `--codec int4` also its low-bit
outer gradients. Use it over slow links: the bytes are those of all-reduce divided by H, the steps between two syncs.
The defaults are the paper's (outer rate 0.7, momentum 0.9), but for H: 30, of Streaming DiLoCo's 30 to 100 steps.

SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706, algorithm 1) has an error that decays in place of the momentum. With
D_i, how far replica i has moved, in each sync

    e_i = b e_i + D_i; q_i = Q(the k largest of each chunk of e_i); e_i = e_i - q_i; x = x - a mean_i q_i

that is `--outer-lr 1 --outer-momentum 0 --codec topk --two-bits --topk-chunk 4096 --density 0.02 --error-decay 0.95`:
a 1, chunks of 4096, of which 1 to 3 % are sent, b 0.95. Here a chunk is a run of elements of a bucket, there a tile
of 64 x 64; Q has four levels as there, with other bounds between them.
"""

from shoal.config import RunConfig
from shoal.config.strategy import StrategyConfig
from shoal.cost import Cost, Sizes
from shoal.sync import local
from shoal.sync.local import Local
from shoal.sync.outer import Nesterov, Outer

OUTER_RATE = 0.7
OUTER_MOMENTUM = 0.9


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """That of local training with an outer rule."""
    return local.cost(config, sizes, outer=True)


class DiLoCo(Local):
    """Local training under an outer Nesterov momentum."""

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        return True

    def outer(self) -> Outer:
        return self._rule(Nesterov, OUTER_RATE, OUTER_MOMENTUM)
