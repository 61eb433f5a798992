"""Layouts: where the tensors of one replica live. A layout is one file here and one line in `LAYOUTS`."""

from collections.abc import Callable

from torch import nn

from shoal.layouts import replicated
from shoal.layouts.base import Loss, Placed
from shoal.mesh import Mesh
from shoal.precision import Policy

Place = Callable[[nn.Module, Loss, Mesh, Policy], Placed]

LAYOUTS: dict[str, Place] = {"replicated": replicated.place}
