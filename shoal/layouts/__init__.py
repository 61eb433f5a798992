"""Layouts: where the tensors of one replica live. A layout is one file here and one row of `LAYOUTS`.

Each layout stands on the one before it: it takes a placed model, and gives one of which every rank holds less.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import shoal.models  # noqa: F401  (before anything of transformers: it keeps torchao out)
from shoal.config import LayoutConfig
from shoal.layouts import replicated
from shoal.layouts.base import Function, PlacedModel
from shoal.layouts.context import Context
from shoal.layouts.cutting import Watched
from shoal.layouts.sharded import Sharded
from shoal.layouts.stages import Stages, look
from shoal.layouts.tensor import TensorParallel
from shoal.tensors.piece import take_wide_gradients
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh


@dataclass
class Request:
    """What layouts are made from. Pipelines cut at the place that they have seen in the whole model."""

    mesh: Mesh
    policy: Policy
    options: LayoutConfig
    empty_micro_batch: dict[str, Tensor]  # without samples, of the shape that all have
    seen: Watched | None = None
    stages: Stages | None = None


def _seen(placed: PlacedModel, to: Request) -> PlacedModel:
    to.seen = look(placed, to.mesh, to.policy, to.options, to.empty_micro_batch)
    return placed


def _tensor(placed: PlacedModel, to: Request) -> PlacedModel:
    return TensorParallel(placed, to.mesh, to.policy)


def _context(placed: PlacedModel, to: Request) -> PlacedModel:
    return Context(placed, to.mesh, to.policy, to.empty_micro_batch)


def _stages(placed: PlacedModel, to: Request) -> PlacedModel:
    assert to.seen is not None
    to.stages = Stages(placed, to.mesh, to.seen, to.options)
    return to.stages


def _zero(placed: PlacedModel, to: Request) -> PlacedModel:
    offload = to.options.offload == "parameters"
    return Sharded(placed, to.mesh, to.policy, to.options.zero_stage or 3, offload=offload)


def _pipelined(placed: PlacedModel, to: Request) -> PlacedModel:
    from shoal.layouts.pipelined import Pipelined  # torch's schedules take seconds to import

    assert to.stages is not None
    return Pipelined(placed, to.stages, to.mesh, to.options)


# The axis of the mesh along which each cuts, in the order in which they are applied.
LAYOUTS: tuple[tuple[str, Callable[[PlacedModel, Request], PlacedModel]], ...] = (
    ("pipeline", _seen),
    ("tensor", _tensor),
    ("context", _context),
    ("pipeline", _stages),
    ("zero", _zero),
    ("pipeline", _pipelined),
)


def place(
    model: nn.Module,
    loss: Function,
    mesh: Mesh,
    policy: Policy,
    options: LayoutConfig,
    empty_micro_batch: dict[str, Tensor],
) -> PlacedModel:
    """Give every rank of `mesh` its part of `model`, with the parameters of the first replica.

    `loss` is what training differentiates. Raises UserError where the model cannot be cut so.
    """
    placed = replicated.place(model, loss, mesh, policy)
    to = Request(mesh, policy, options, empty_micro_batch)
    for axis, layout in LAYOUTS:
        if mesh.size(axis) > 1:
            placed = layout(placed, to)
    take_wide_gradients(placed.pieces)
    replicated.broadcast_parameters(placed, mesh)
    return placed
