"""`--offload`: the host's memory holds what a GPU has no room for, and optimizers step there.

- optimizer    their state (Ren et al. 2021, "ZeRO-Offload", without its delayed update), under any layout. In a step
  parameters and gradients go to the host and new parameters come back: 3 P bytes of P bytes of parameters, since a
  strategy may have changed these. Frees what the optimizer keeps, 2 P of AdamW; costs the host as much, and copies of
  parameters and gradients, 2 P, each tensor's rounded up to a power of two; and the time of an update by its cores
- parameters   under stage 3 of ZeRO, by FSDP2: a rank's part of parameters, gradients and state is the host's, and a
  block's parameters are on the GPU while it computes. Per micro-batch 2 P / S go there, and P / S of gradients come
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.errors import UserError
from shoal.tensors.piece import Piece


def check(offload: str, device: torch.device) -> None:
    """Raise UserError where the host's memory is the device's already."""
    if offload != "none" and device.type == "cpu":
        found = "the processor computes, and its memory holds everything already"
        raise UserError(f"--offload {offload}", found, "leave it out, or take --optim adamw-8bit")


def on_host(pieces: Sequence[Piece]) -> list[Piece]:
    """Copies of the pieces in the host's memory, for optimizers to be built over."""
    return [replace(piece, local=_copy(piece.local)) for piece in pieces]


def step_there(optimizers: Sequence[Optimizer], pieces: Sequence[Piece], there: Sequence[Piece]) -> None:
    """Make optimizers built over the copies `there` update `pieces` at every step."""
    pairs = [(piece.local, copy.local) for piece, copy in zip(pieces, there, strict=True)]
    for optimizer in optimizers:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        mine = [(p, copy) for p, copy in pairs if copy in own]
        optimizer.register_step_pre_hook(lambda *_, mine=mine: _bring(mine))
        optimizer.register_step_post_hook(lambda *_, mine=mine: _take_back(mine))


def _copy(p: Tensor) -> nn.Parameter:
    pinned = p.device.type == "cuda"  # or the bus would wait for pages
    values = torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned)
    copy = nn.Parameter(values, requires_grad=p.requires_grad)
    copy.grad_dtype = p.grad_dtype
    copy.grad = torch.empty_like(values, dtype=p.grad_dtype, pin_memory=pinned)
    return copy


@torch.no_grad()
def _bring(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    for p, copy in pairs:
        copy.copy_(p, non_blocking=True)
        grad, own = copy.grad, p.grad
        assert grad is not None
        assert own is not None
        grad.copy_(own, non_blocking=True)
    if pairs and pairs[0][0].device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # the processor must not read what is on its way


@torch.no_grad()
def _take_back(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    for p, copy in pairs:
        p.copy_(copy, non_blocking=True)
