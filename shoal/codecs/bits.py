"""Tensors as bytes, and small whole numbers packed into bytes. All works along the last dimension."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def to_bytes(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` [..., n]: uint8 [..., n * itemsize]."""
    return tensor.contiguous().view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_bytes` was given. Copies only where the bytes do not lie as `dtype` needs them."""
    line = payload.reshape(-1)
    if line.storage_offset() % dtype.itemsize:
        line = line.clone()
    return line.view(dtype).view(*payload.shape[:-1], payload.shape[-1] // dtype.itemsize)


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., n] to uint8 [..., ceil(n / 8)], the first in the lowest bit."""
    return _pack(bits.to(torch.uint8), width=1)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """What `pack_bits` was given, as 0 and 1: uint8 [..., numel]."""
    return _unpack(packed, numel, width=1)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Uint8 below 16 [..., n] to uint8 [..., ceil(n / 2)], the first in the low half."""
    return _pack(numbers, width=4)


def unpack_nibbles(packed: Tensor, numel: int) -> Tensor:
    """What `pack_nibbles` was given: uint8 [..., numel]."""
    return _unpack(packed, numel, width=4)


def _pack(numbers: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    groups = pad(numbers, (0, -numbers.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = groups[..., 0].clone()
    for place in range(1, per_byte):
        packed |= groups[..., place] << (place * width)
    return packed


def _unpack(packed: Tensor, numel: int, width: int) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    numbers = (packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return numbers.flatten(-2)[..., :numel]
