"""The whole model on every rank."""

import torch
from torch import nn

from shoal.collectives import Wire
from shoal.layouts.base import Loss, Placed
from shoal.mesh import Mesh
from shoal.precision import Policy


def place(model: nn.Module, loss: Loss, mesh: Mesh, policy: Policy) -> Placed:
    """Move `model` to the rank's device in the policy's dtype, with the parameters and buffers of rank 0.

    Buffers stay in at least float32: angles of positions rounded to bf16 would be off by whole turns.
    """
    model = model.to(device=mesh.device, dtype=torch.promote_types(policy.parameters, torch.float32))
    for p in model.parameters():
        p.data = p.data.to(policy.parameters)
    wire = Wire(mesh.group)
    for tensor in (*model.parameters(), *model.buffers()):
        wire.broadcast(tensor.data)
    return Placed.whole(model, loss)
