"""The whole model on every rank."""

import torch
from torch import nn

from shoal.layouts.base import Function, PlacedModel, whole_model
from shoal.models.on_disk import cast, into_memory
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh


def place(model: nn.Module, loss: Function, mesh: Mesh, policy: Policy) -> PlacedModel:
    """Move `model` to the rank's device in the policy's dtype; where ZeRO alone cuts it, FSDP does so layer by layer.

    Buffers stay in at least float32: angles of positions rounded to bf16 would be off by whole turns.
    """
    if mesh.size("zero") == 1 or mesh.size("team") > 1:
        model = model.to(mesh.device)
    for p in model.parameters():
        cast(p, policy.parameters)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.promote_types(policy.parameters, torch.float32))
    return whole_model(model, loss)


def broadcast_parameters(placed: PlacedModel, mesh: Mesh) -> None:
    """Give every replica the parameters and buffers of the first one; each rank receives its own pieces alone.

    These bytes do not count: they belong to no step.
    """
    wire = mesh.wire("replicate")
    into_memory(placed.model)
    for tensor in (*(piece.local for piece in placed.pieces), *placed.model.buffers()):
        if tensor.numel():
            wire.broadcast(tensor.data, "first parameters", counted=False)
