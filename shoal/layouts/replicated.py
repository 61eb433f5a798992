"""The whole model on every rank."""

from torch import nn

from shoal.collectives import Wire
from shoal.layouts.base import Loss, Placed
from shoal.mesh import Mesh
from shoal.precision import Policy


def place(model: nn.Module, loss: Loss, mesh: Mesh, policy: Policy) -> Placed:
    """Move `model` to the rank's device in the policy's dtype, with the parameters and buffers of rank 0."""
    model = model.to(device=mesh.device, dtype=policy.parameters)
    wire = Wire(mesh.group)
    for tensor in (*model.parameters(), *model.buffers()):
        wire.broadcast(tensor.data)
    return Placed.whole(model, loss)
