"""Layouts: where the tensors of one replica live. A layout is one file here, and stands on the one before it."""

from torch import Tensor, nn

import shoal.models  # noqa: F401  (before anything of transformers: it keeps torchao out)
from shoal.config import LayoutConfig
from shoal.layouts import replicated
from shoal.layouts.base import Loss, PlacedModel
from shoal.layouts.context import Context
from shoal.layouts.sharded import Sharded
from shoal.layouts.stages import Stages, look
from shoal.layouts.tensor import TensorParallel
from shoal.tensors.piece import take_wide_gradients
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh


def place(
    model: nn.Module,
    loss: Loss,
    mesh: Mesh,
    policy: Policy,
    options: LayoutConfig,
    nothing: dict[str, Tensor],
) -> PlacedModel:
    """Give every rank of `mesh` its part of `model`, with the parameters of the first replica.

    `nothing` is a micro-batch without samples, of the shape that all have.
    """
    placed = replicated.place(model, loss, mesh, policy)
    seen = look(placed, mesh, policy, options, nothing) if mesh.size("pipeline") > 1 else None
    if mesh.size("tensor") > 1:
        placed = TensorParallel(placed, mesh, policy)
    if mesh.size("context") > 1:
        placed = Context(placed, mesh, policy, nothing)
    stages = None
    if seen is not None:
        placed = stages = Stages(placed, mesh, seen, options)
    if mesh.size("zero") > 1:
        offload = options.offload == "parameters"
        placed = Sharded(placed, mesh, policy, options.zero_stage or 3, offload=offload)
    if stages is not None:
        from shoal.layouts.pipelined import Pipelined  # torch's schedules take seconds to import

        placed = Pipelined(placed, stages, mesh, options)
    take_wide_gradients(placed.pieces)
    replicated.share(placed, mesh)
    return placed
