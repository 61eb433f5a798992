"""AdamW with its two moments in 8 bits: codes, and a scale for each block of them, as torchao has it.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization". Blocks lie along the last dim, so that a piece
of a parameter is a whole number of them however its rows are cut, and a checkpoint can hold codes and scales as plain
tensors, of which any layout reads its own. An element takes 2 (1 + 4 / block) bytes instead of AdamW's 8: 2.03 with
blocks of 256.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torchao import optim as torchao

from shoal.tensors.tensor_files import CODES, SCALE

BLOCK = 256  # elements that share a scale, fewer where the last dim has no such divisor
SMALLEST_BLOCK = 32
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # part of the state -> has a sign


class AdamW8bit(torchao.AdamW8bit):
    """torchao's, with blocks along the last dim, and state that goes in and out as plain tensors."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        block = block_size(p.shape)
        held: Tensor = self._subclass_zeros(p, signed, block) if block else torch.zeros_like(p)
        return held

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update. On a CPU it is not compiled: that takes a C++ compiler, and longer than the steps it saves."""
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            super().step(closure)

    def plain(self, p: Tensor) -> dict[str, Tensor]:
        """The live state of a parameter by part: "step", and "exp_avg" or its codes [*p] and scales [..., n]."""
        parts: dict[str, Tensor] = {}
        for part, tensor in self.state[p].items():
            if isinstance(tensor, torchao.subclass_8bit.OptimState8bit):
                parts[part + CODES] = tensor.codes
                parts[part + SCALE] = tensor.scale.view(*p.shape[:-1], -1)
            else:
                parts[part] = tensor
        return parts

    def state_bytes(self, p: Tensor) -> int:
        """Codes and scales, or two moments in full; and a count of steps."""
        block = block_size(p.shape)
        return 4 + 2 * (p.numel() + 4 * p.numel() // block if block else p.nbytes)

    def adopt(self, p: Tensor, parts: dict[str, Tensor]) -> None:
        """Go on from the state that `plain` gave, of which scales may be one for each element by now.

        Bit for bit where what shares a scale now has done so before, too; otherwise rounded anew.
        """
        state = self.state[p] = {"step": parts["step"].cpu().clone()}
        for part, signed in MOMENTS.items():
            state[part] = held = self._new_buffer(p, signed)
            codes, scale = (parts.get(part + each) for each in (CODES, SCALE))
            if codes is None or scale is None:
                held.copy_(parts[part].to(p.device))
                continue
            of_block = _for_each(codes, scale).reshape(-1, block_size(p.shape) or 1)
            if block_size(p.shape) and (of_block == of_block[:, :1]).all():
                held.codes.copy_(codes)  # type: ignore[attr-defined]
                held.scale.copy_(of_block[:, 0])  # type: ignore[attr-defined]
            else:
                held.copy_(_wide(codes, scale, signed).to(p.device))


def block_size(shape: torch.Size) -> int:
    """The elements that share a scale in a tensor of this shape; 0 where it is kept in full: what is no matrix.

    How many rows there are does not matter (torchao keeps tensors below 4096 elements in full): the same elements are
    coded alike however rows are cut.
    """
    if len(shape) < 2:
        return 0
    largest = min(BLOCK, shape[-1] & -shape[-1])  # the largest power of two that divides it
    return largest if largest >= SMALLEST_BLOCK else 0


def wide(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state with its moments in float32, for an optimizer that holds them so."""
    coded = {part: signed for part, signed in MOMENTS.items() if part + CODES in parts}
    plain = {part: tensor for part, tensor in parts.items() if not part.endswith((CODES, SCALE))}
    return plain | {
        part: _wide(parts[part + CODES], parts[part + SCALE], signed) for part, signed in coded.items()
    }


def _wide(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    form: Any = torchao.subclass_8bit
    levels = torch.tensor(form.get_qmap_signed() if signed else form.get_qmap_unsigned(), device=codes.device)
    return levels[codes.int()] * _for_each(codes, scale)


def _for_each(codes: Tensor, scale: Tensor) -> Tensor:
    """The scale of each code [*codes]."""
    return scale.to(codes.device).repeat_interleave(codes.shape[-1] // scale.shape[-1], dim=-1)
