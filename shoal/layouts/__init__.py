"""Layouts: where the tensors of one replica live. A layout is one file here and one row of `LAYOUTS`.

Each layout stands on the one before it: it takes a placed model, and gives one of which every rank holds less.
"""

from collections.abc import Callable

from torch import Tensor, nn

import shoal.models  # noqa: F401  (before anything of transformers: it keeps torchao out)
from shoal.config import LayoutConfig
from shoal.layouts import replicated
from shoal.layouts.base import Function, PlacedModel, Request
from shoal.layouts.context import Context
from shoal.layouts.sharded import Sharded
from shoal.layouts.stages import Stages, watch_whole
from shoal.layouts.tensor import TensorParallel
from shoal.tensors.piece import take_wide_gradients
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh


def _pipelined(inner: PlacedModel, request: Request) -> PlacedModel:
    from shoal.layouts.pipelined import Pipelined  # torch's schedules take seconds to import

    return Pipelined(inner, request)


# In their order: the axis of the mesh that asks for a layout, and what makes it on the one before.
LAYOUTS: tuple[tuple[str, Callable[[PlacedModel, Request], PlacedModel]], ...] = (
    ("pipeline", watch_whole),  # only a whole model shows where its stages can be
    ("tensor", TensorParallel),
    ("context", Context),
    ("pipeline", Stages),
    ("zero", Sharded),
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
    request = Request(mesh, policy, options, empty_micro_batch)
    for axis, layout in LAYOUTS:
        if mesh.size(axis) > 1:
            placed = layout(placed, request)
    take_wide_gradients(placed.pieces)
    replicated.broadcast_parameters(placed, mesh)
    return placed
