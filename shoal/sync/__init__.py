"""Sync: when and how replicas agree. A strategy is one file here, and one row of `shoal.config.strategies`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from shoal.config import RunConfig
from shoal.config.strategies import STRATEGIES
from shoal.cost import Cost, Sizes
from shoal.replica import Replica
from shoal.sync.base import Sync

__all__ = ["COSTS", "SYNCS", "Sync", "cost_of"]

_HOMES = {name: traits.kind.split(".") for name, traits in STRATEGIES.items()}
_MODULES: dict[str, Any] = {
    name: import_module(f"{__name__}.{module}") for name, (module, _) in _HOMES.items()
}
SYNCS: dict[str, type[Sync]] = {name: getattr(_MODULES[name], kind) for name, (_, kind) in _HOMES.items()}
# What a strategy sends and holds, as arithmetic.
COSTS: dict[str, Callable[[RunConfig, Sizes], Cost]] = {name: home.cost for name, home in _MODULES.items()}


def cost_of(config: RunConfig, replica: Replica) -> Cost:
    """What the run's strategy is expected to send and to hold for a replica, as arithmetic."""
    shapes = tuple(p.shape for _, p in replica.params)
    sizes = Sizes(shapes, replica.mesh.replicate.size, replica.policy.reduction.itemsize)
    return COSTS[config.strategy.name](config, sizes)
