"""NoLoCo: DiLoCo whose outer step needs one other replica, not all. Only a few numbers a step go to all ranks.

Kolehmainen et al. 2025, "NoLoCo: No-all-reduce Low Communication Training Method for Large Models" (arXiv 2506.10911,
from memory). Every replica i holds slow parameters x_i of its own. In each sync the ranks are paired anew at random;
with D = x - y, how far a replica has moved from its slow parameters, and the means over the pair

    d_i = alpha d_i + beta mean_j D_j + gamma (x_i - mean_j x_j);  x_i -= d_i;  y_i = x_i

beta is `outer_lr` (0.7), alpha `outer_momentum` (0.5). The last term holds the replicas together: at gamma = 1, the
value here, a pair without momentum meets in the middle. A rank without a partner steps alone. A sync sends 2 P:
D and x. Held: x and d; during a sync the partner's D and x as well. The mean of the replicas is evaluated and saved.

Use it with many ranks over slow links, where an all-reduce of parameters takes as long as the slowest of them. With
few ranks `diloco` sends half as much and agrees exactly. It uses no codec: replicas differ for good here, and a
codec's error could not be told from such a difference.
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
    """The partner of `rank` in sync `number`; the rank itself where their count is odd and it is left over."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "pairs", number))
    order = torch.randperm(world_size, generator=generator).tolist()
    other = order.index(rank) ^ 1
    return int(order[other]) if other < world_size else rank


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """Delta and slow parameters, to one rank a period."""
    every = period_of(config.strategy).steps or math.inf
    return Cost(sent=2 * sizes.nbytes / every if sizes.world_size > 1 else 0, held=2 * sizes.nbytes)


class NoLoCo(Local):
    """Local training under an outer momentum, agreed on in pairs."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.seed = config.train.seed
        self.syncs = 0

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        return True

    def outer(self) -> Outer:
        return self._rule(BlockMomentum, OUTER_RATE, OUTER_MOMENTUM)

    def state_dict(self) -> State:
        return super().state_dict() | {"syncs": torch.tensor(self.syncs)}

    def _own_state(self, states: Sequence[State]) -> State:
        """Each rank's own; with another number of ranks all continue from the mean of all."""
        same = len(states) == self._wire.world_size
        state: State = states[self._wire.rank] if same else mean_of(states)
        self.syncs = int(state["syncs"])
        return state

    def _sync_shared(self, done: int, step: Step) -> None:
        """If a sync is due, average with this sync's partner and take the outer step."""
        if not self.period.due(done, step.labels):
            return
        own = [torch.stack([shared.delta(), shared.flat]) for shared in self.shared]
        self.drift = apart([delta for delta, _ in own], [x for _, x in own])
        means = self._means_of_pair(own)
        for shared, (delta, centre) in zip(self.shared, means, strict=True):
            pull = (shared.flat - centre).mul_(GAMMA / shared.outer.rate)
            shared.outer_step(delta + pull, step.learning_rate)

    def _means_of_pair(self, own: list[Tensor]) -> list[Tensor]:
        other = partner(self._wire.rank, self._wire.world_size, self.seed, self.syncs)
        self.syncs += 1
        if other == self._wire.rank:
            return own
        theirs = [torch.empty_like(tensor) for tensor in own]
        self._wire.start_swap(own, theirs, other).wait()
        return [(a + b).div_(2) for a, b in zip(own, theirs, strict=True)]
