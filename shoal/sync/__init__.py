"""Sync: when and how replicas agree. A strategy is one file here, one row below, and its row of traits.

The traits stand in `shoal.config.strategies`, free of torch.
"""

from collections.abc import Callable

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.replica import Replica
from shoal.sync import allreduce, asynchronous, demo, diloco, gossip, local, noloco, server
from shoal.sync.base import Sync

__all__ = ["COSTS", "SYNCS", "Sync", "cost_of"]

# Its class, and what it sends and holds as arithmetic.
_ROWS: dict[str, tuple[type[Sync], Callable[[RunConfig, Sizes], Cost]]] = {
    "allreduce": (allreduce.AllReduce, allreduce.cost),
    "server": (server.Server, server.cost),
    "async": (asynchronous.Async, asynchronous.cost),
    "local": (local.Local, local.cost),
    "diloco": (diloco.DiLoCo, diloco.cost),
    "noloco": (noloco.NoLoCo, noloco.cost),
    "gossip": (gossip.Gossip, gossip.cost),
    "demo": (demo.DeMo, demo.cost),
}
SYNCS: dict[str, type[Sync]] = {name: kind for name, (kind, _) in _ROWS.items()}
COSTS: dict[str, Callable[[RunConfig, Sizes], Cost]] = {name: cost for name, (_, cost) in _ROWS.items()}


def cost_of(config: RunConfig, replica: Replica) -> Cost:
    """What the run's strategy is expected to send and to hold for a replica, as arithmetic."""
    shapes = tuple(p.shape for _, p in replica.params)
    sizes = Sizes(shapes, replica.mesh.replicate.size, replica.policy.reduction.itemsize)
    return COSTS[config.strategy.name](config, sizes)
