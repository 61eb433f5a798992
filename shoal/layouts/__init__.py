"""Layouts: where the tensors of one replica live. A layout is one file here, and takes one axis of the mesh."""

from torch import nn

from shoal.config import LayoutConfig
from shoal.layouts import replicated
from shoal.layouts.base import Loss, Placed
from shoal.layouts.sharded import Sharded
from shoal.mesh import Mesh
from shoal.precision import Policy


def place(model: nn.Module, loss: Loss, mesh: Mesh, policy: Policy, options: LayoutConfig) -> Placed:
    """Give every rank of `mesh` its part of `model`, with the parameters of rank 0."""
    placed = replicated.place(model, loss, mesh, policy)
    return Sharded(model, loss, mesh, options.zero_stage or 3) if mesh.size("shard") > 1 else placed
