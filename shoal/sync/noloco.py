"""NoLoCo: DiLoCo whose outer step needs one other replica, not all. Only a few numbers a step still go to everybody.

Kolehmainen et al. 2025, "NoLoCo: No-all-reduce Low Communication Training Method for Large Models" (arXiv 2506.10911,
from memory). Every replica i holds slow parameters x_i of its own. In each sync the ranks are paired anew at random;
with D = x - y, what a replica has come away from its slow parameters, and the means over the pair

    d_i = alpha d_i + beta mean_j D_j + gamma (x_i - mean_j x_j);  x_i -= d_i;  y_i = x_i

beta is `outer_lr` (0.7), alpha `outer_momentum` (0.5). The last term holds the replicas together: at gamma = 1, the
value here, a pair without momentum meets in its middle. A rank that finds no partner steps alone. A sync sends 2 P:
D and x. Held: x, d, and both of the partner's meanwhile. What is evaluated and saved is the mean of the replicas.

Use it with many ranks over slow links, where an all-reduce of parameters takes as long as the slowest of them; with
few, `diloco` sends half and agrees exactly. No codec: where replicas differ for good, its error would pass for a
difference.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.config.strategy import StrategyConfig
from shoal.cost import Cost, Sizes
from shoal.data.order import derive_seed
from shoal.replica import Step
from shoal.sync.base import State, mean_of
from shoal.sync.local import Local, period_of
from shoal.sync.outer import BlockMomentum, Outer
from shoal.sync.parameters import apart
from shoal.wire.wire import Wire

OUTER_RATE = 0.7
OUTER_MOMENTUM = 0.5
GAMMA = 1.0


def partner(rank: int, world_size: int, seed: int, number: int) -> int:
    """Whom `rank` meets in sync `number`; itself where their count is odd and it is left over."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "pairs", number))
    order = torch.randperm(world_size, generator=generator).tolist()
    other = order.index(rank) ^ 1
    return int(order[other]) if other < world_size else rank


class NoLoCo(Local):
    """Local training under an outer momentum, agreed on in pairs."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.seed = config.train.seed
        self.syncs = 0

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        """Always."""
        return True

    def outer(self) -> Outer:
        """A new outer momentum."""
        return self._asked(BlockMomentum, OUTER_RATE, OUTER_MOMENTUM)

    def state_dict(self) -> State:
        """The slow parameters and the momentum of this rank, and whose turn it is."""
        return super().state_dict() | {"syncs": torch.tensor(self.syncs)}

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """Delta and slow parameters, to one rank a period."""
        every = period_of(config.strategy).steps or math.inf
        return Cost(sent=2 * sizes.nbytes / every if sizes.world_size > 1 else 0, held=2 * sizes.nbytes)

    def _taken_up(self, states: Sequence[State]) -> State:
        """Each rank its own; by another number of ranks all go on from the mean of all."""
        same = len(states) == self.wire.world_size
        state: State = states[self.wire.rank] if same else mean_of(states)
        self.syncs = int(state["syncs"])
        return state

    def _sync_shared(self, done: int, step: Step) -> None:
        """Meet the partner of this sync, if one is due, and take the outer step."""
        if not self.period.due(done, step.labels):
            return
        own = [torch.stack([shared.delta(), shared.flat]) for shared in self.shared]
        self.drift = apart([delta for delta, _ in own], [x for _, x in own])
        means = self._means_of_pair(own)
        for shared, (delta, centre) in zip(self.shared, means, strict=True):
            pull = (shared.flat - centre).mul_(GAMMA / shared.outer.rate)
            shared.settle(delta + pull, step.learning_rate)

    def _means_of_pair(self, own: list[Tensor]) -> list[Tensor]:
        other = partner(self.wire.rank, self.wire.world_size, self.seed, self.syncs)
        self.syncs += 1
        if other == self.wire.rank:
            return own
        theirs = [torch.empty_like(tensor) for tensor in own]
        self.wire.start_swap(own, theirs, other).wait()
        return [(a + b).div_(2) for a, b in zip(own, theirs, strict=True)]
