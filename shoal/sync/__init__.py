"""Sync: when and how replicas agree. A strategy is one file here and one line in `SYNCS`."""

from shoal.sync.allreduce import AllReduce
from shoal.sync.asynchronous import Async
from shoal.sync.base import Sync
from shoal.sync.demo import DeMo
from shoal.sync.diloco import DiLoCo
from shoal.sync.gossip import Gossip
from shoal.sync.local import Local
from shoal.sync.noloco import NoLoCo
from shoal.sync.server import Server

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
