"""Layouts: where the tensors of one replica live. A layout is one file here and one line in `LAYOUTS`."""

from collections.abc import Callable

from torch import nn

from shoal.layouts import replicated
from shoal.mesh import Mesh
from shoal.precision import Policy

Place = Callable[[nn.Module, Mesh, Policy], nn.Module]

LAYOUTS: dict[str, Place] = {"replicated": replicated.place}
