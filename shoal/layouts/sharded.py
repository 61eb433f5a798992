"""Parameter-parallel: each rank of an island holds a part of every parameter, gradient and optimizer state.

ZeRO (Rajbhandari et al. 2020) on torch's FSDP2: parameters are cut along their first dim, gathered for the block of
the model that computes, and what the ranks find as gradients is summed into each rank's part. Per micro-batch, with P
bytes of parameters and S ranks, a rank sends

- stage 3  (S - 1) / S 3 P: gathered for the forward pass and again for the backward pass; gradients scattered
- stage 2  (S - 1) / S P, the gradients; in a step once more P for the parameters, which stay until its end
- stage 1  nothing; in a step (S - 1) / S 2 P: gradients stay whole until the last micro-batch too

and holds of parameters, gradients and AdamW's moments 1 + 1 + 2 parts of P / S, beside what is whole at a time: one
block in stage 3, all parameters in stage 2, all parameters and gradients in stage 1. Under bf16 autocast a backward
pass reads the weights' bf16 copies, which autograd keeps from the forward pass: P / 2 more in stage 3.
"""

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad
from torch.distributed.tensor import DTensor

from shoal.errors import UserError
from shoal.layouts.base import Function, PlacedModel, Request
from shoal.models.blocks import blocks
from shoal.tensors.piece import Piece, trained
from shoal.wire.mesh import Mesh
from shoal.wire.wire import Wire


class Whole(nn.Module):
    """The root of FSDP: parameters outside the blocks are whole only within its forward pass."""

    def __init__(self, model: nn.Module, apply: Callable[[Function, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._apply_to_model = apply

    def forward(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        """`function` of the model, by the layout below."""
        return self._apply_to_model(function, inputs)


class Sharded(PlacedModel):
    """The pieces of another layout cut over the ranks that compute other tokens, at a stage of ZeRO."""

    def __init__(self, inner: PlacedModel, request: Request) -> None:
        mesh, policy, model = request.mesh, request.policy, inner.model
        axis, offload = mesh.axes["zero"], request.options.offload == "parameters"
        self.stage = stage = request.options.zero_stage or 3
        layers = [layer for layer in blocks(model) if any(True for _ in layer.parameters())]
        _check(model, layers, mesh)
        self.wire = mesh.wire("zero")
        self.root = Whole(model, inner._apply)
        self._parts = [_part_bytes(module, axis.size) for module in layers]
        below = {id(p) for module in layers for p in module.parameters()}
        self._parts.append(_part_bytes(model, axis.size, without=below))
        names = {p: name for name, p in model.named_parameters()}
        grid = DeviceMesh.from_group(axis.group, mesh.device.type, mesh_dim_names=("shard",))
        host = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
        self._wide = policy.gradients if policy.gradients != policy.parameters else None
        cut = partial(
            fully_shard,
            mesh=grid,
            offload_policy=host,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=self._wide, cast_forward_inputs=False),
        )
        for module in layers:
            cut(module, reshard_after_forward=stage == 3)
        # Parameters outside the blocks are needed again as soon as the forward pass ends.
        cut(self.root, reshard_after_forward=False)
        self.parts = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        gather, scatter = GatherParameters(self.wire), ScatterGradients(self.wire)
        self._scattered = scatter.dtypes
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)  # losses are divided by the labels of the step already
            part.set_force_sum_reduction_for_comms(True)  # else gloo is asked for a sum it does not have
            part.set_reduce_scatter_unused_params(True)  # a rank may use a parameter that another does not
            part.set_custom_all_gather(gather)
            part.set_custom_reduce_scatter(scatter)
        pieces = [
            _cut(piece, model.get_parameter(names[piece.source]), axis.index)
            if piece.source in names
            else piece
            for piece in inner.pieces
        ]
        super().__init__(model, pieces, inner._loss, inner)
        if not trained(pieces):
            _refuse(mesh, f"worker {mesh.rank} would hold nothing of this model", "take a smaller number")

    def _apply(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.root(function, inputs)
        return found

    def _begin(self, *, last: bool) -> None:
        """Keep parameters, and in stage 1 gradients, whole until the last micro-batch of a step."""
        super()._begin(last=last)
        for part in self.parts:
            part.set_is_last_backward(last)
            part.set_reshard_after_backward(last or self.stage == 3, recurse=False)
            part.set_requires_gradient_sync(last or self.stage > 1, recurse=False)
        if self._wide:
            self.parts[0]._get_fsdp_state()._lazy_init()  # else it would undo what follows
            for group in self._groups():
                _sum_in(self._wide, group)

    def _groups(self) -> Iterator[Any]:
        """FSDP's groups of parameters, each of which it gathers at once."""
        for part in self.parts:
            yield from part._get_fsdp_state()._fsdp_param_groups

    def after_evaluation(self) -> None:
        super().after_evaluation()
        for part in self.parts:
            part.reshard()

    def _gathered(self) -> Iterator[Tensor]:
        for group in self._groups():
            for each in group.fsdp_params:
                yield from each.all_gather_outputs

    def _held(self) -> dict[str, int]:
        """As the head of this file has it: rows filled up to be even; whole, two blocks at a time or all of them."""
        *layers, rest = [whole for whole, _ in self._parts]
        whole = sorted(layers)[-2:] if self.stage == 3 else layers
        gathered = self.wire.world_size * (sum(whole) + rest)
        return {"parameters": sum(layers) + rest, "gathered for the island": gathered}

    @property
    def _reduced(self) -> set[torch.dtype]:
        return super()._reduced | self._scattered

    def _cost(self, turns: int, shape: tuple[int, int]) -> float:
        """As the head of this file has it; what stands outside the blocks is gathered once for both passes."""
        *layers, rest = self._parts
        scattered = turns if self.stage > 1 else 1
        gathered = turns if self.stage == 3 else 1
        again = gathered if self.stage == 3 else 0  # for the backward pass
        sent = sum((gathered + again) * whole + scattered * trained for whole, trained in layers)
        sent += gathered * rest[0] + scattered * rest[1]
        return super()._cost(turns, shape) + (self.wire.world_size - 1) * sent

    def __str__(self) -> str:
        what = {
            1: "optimizer state",
            2: "gradients and optimizer state",
            3: "parameters, gradients and state",
        }
        cut, size = what[self.stage], self.wire.world_size
        if self._inner is not None and self._inner._inner is not None:
            return f"{self._inner}; {cut} cut over {size} of them"
        return f"replicas of {size} workers, each with its part of {cut}"


def is_recent_torch() -> bool:
    """Whether it is torch 2.13 or later, by what that version brought."""
    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def _check(model: nn.Module, layers: list[nn.Module], mesh: Mesh) -> None:
    """Raises UserError where FSDP2 cannot cut a model, or would cut it wrongly."""
    if not is_recent_torch():
        _refuse(mesh, f"this is torch {torch.__version__}", "install torch 2.13 or later")
    if any(p.dim() == 0 for p in model.parameters()):
        _refuse(mesh, "the model has a parameter without a dim", "take another model")
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        _refuse(mesh, "workers would leave out different layers (layerdrop)", "add --model.layerdrop 0")
    if mesh.device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
        _refuse(mesh, "cuDNN keeps the weights of a recurrent layer elsewhere", "leave it out")
    inner = [id(p) for layer in layers for p in layer.parameters()]
    below = {id(module) for layer in layers for module in layer.modules()}
    outer = [id(p) for m in model.modules() if id(m) not in below for p in m.parameters(recurse=False)]
    if len(set(inner)) < len(inner) or set(inner) & set(outer):
        _refuse(mesh, "two layers of the model share a parameter", "take another model")


def _refuse(mesh: Mesh, found: str, change: str) -> None:
    flag, axis = ("--dp-shard", "shard") if mesh.size("shard") > 1 else ("--cp", "context")
    raise UserError(f"{flag} {mesh.size(axis)}", found, change)


def _sum_in(wide: torch.dtype, group: Any) -> None:
    """Make FSDP sum gradients in `wide`, and give every trained parameter of the group a sum.

    FSDP would round the gradient of each micro-batch to the parameters' dtype, and refuse a group in which some
    parameters have a gradient and others none yet.
    """
    group._orig_dtype = wide
    if any(each.unsharded_accumulated_grad is not None for each in group.fsdp_params):
        for each in group.fsdp_params:
            if each.unsharded_accumulated_grad is None and each.sharded_param.requires_grad:
                each.unsharded_accumulated_grad = torch.zeros_like(each._unsharded_param, dtype=wide)


def _part_bytes(module: nn.Module, ranks: int, without: Container[int] = ()) -> tuple[int, int]:
    """The bytes that a rank holds of parameters, and of the gradients of trained ones; rows filled up to be even."""
    parts = [(-(-p.shape[0] // ranks) * p[0].numel(), p) for p in module.parameters() if id(p) not in without]
    held = sum(size * p.itemsize for size, p in parts)
    gradients = sum(
        size * torch.promote_types(p.dtype, torch.float32).itemsize for size, p in parts if p.requires_grad
    )
    return held, gradients


def _cut(piece: Piece, source: nn.Parameter, rank: int) -> Piece:
    """This rank's part of a piece whose parameter FSDP has cut: `source`."""
    assert isinstance(source, DTensor)
    rows = -(-source.shape[0] // source.device_mesh.size())
    local, first = source.to_local().detach(), min(rank * rows, source.shape[0])
    held = len(local) if piece.local.numel() else 0  # another rank trains it, or this one its rows
    blocks = (block.rows(first, first + held) for block in piece.parts)

    def wrap(view: Tensor) -> Tensor:
        """The view, without a copy: `DTensor.from_local` would move one on the host to the mesh's device."""
        return _from_local_no_grad(view, source._spec)

    return Piece(
        piece.name,
        piece.shape,
        offset=(piece.offset[0] + first, *piece.offset[1:]),
        local=nn.Parameter(local[:held], requires_grad=source.requires_grad),
        source=source,
        unwrap=lambda grad: grad.to_local() if isinstance(grad, DTensor) else grad,
        wrap=wrap,
        parts=tuple(block for block in blocks if 0 not in block.size),
    )


class _OverWire:
    """An exchange of FSDP over a wire. It is waited for at once: here FSDP never asks for one in the background."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.dtypes: set[torch.dtype] = set()  # of what was summed

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for an exchange."""
        return torch.empty(*size, dtype=dtype, device=device)


class GatherParameters(_OverWire, AllGather):
    """The parameters of a block, from the parts of all ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        self.wire.start_all_gather(output_tensor, input_tensor, "parameters").wait()


class ScatterGradients(_OverWire, ReduceScatter):
    """This rank's part of the sums of all ranks' gradients of a block."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        self.dtypes.add(input_tensor.dtype)
        self.wire.start_reduce_scatter(output_tensor, input_tensor, "gradients").wait()
