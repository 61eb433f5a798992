"""Sync: when and how replicas agree. A strategy is one file here and one line in `SYNCS`."""

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.replica import Replica
from shoal.sync.allreduce import AllReduce
from shoal.sync.asynchronous import Async
from shoal.sync.base import Sync
from shoal.sync.demo import DeMo
from shoal.sync.diloco import DiLoCo
from shoal.sync.gossip import Gossip
from shoal.sync.local import Local
from shoal.sync.noloco import NoLoCo
from shoal.sync.server import Server

__all__ = ["SYNCS", "Sync", "cost_of"]

SYNCS: dict[str, type[Sync]] = {
    "allreduce": AllReduce,
    "server": Server,
    "async": Async,
    "local": Local,
    "diloco": DiLoCo,
    "noloco": NoLoCo,
    "gossip": Gossip,
    "demo": DeMo,
}


def cost_of(config: RunConfig, replica: Replica) -> Cost:
    """What the run's strategy is expected to send and to hold for a replica, as arithmetic."""
    shapes = tuple(p.shape for _, p in replica.params)
    sizes = Sizes(shapes, replica.mesh.replicate.size, replica.policy.reduction.itemsize)
    return SYNCS[config.strategy.name].cost(config, sizes)
