"""Bits and bytes: what is packed can be unpacked, and takes the bytes it should."""

import numpy as np
import pytest
import torch

from shoal.codecs.bits import from_bytes, pack_bits, pack_nibbles, to_bytes, unpack_bits, unpack_nibbles


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("numel", [1, 2, 7, 8, 9, 16, 23])
def test_bits_are_packed_as_numpy_packs_them(numel: int, rows: tuple[int, ...]) -> None:
    bits = torch.rand(*rows, numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert (packed.numpy() == np.packbits(bits.numpy(), axis=-1, bitorder="little")).all()
    assert torch.equal(unpack_bits(packed, numel), bits.to(torch.uint8))


@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("numel", [1, 2, 7, 8, 15])
def test_nibbles_are_packed_two_in_a_byte(numel: int, rows: tuple[int, ...]) -> None:
    numbers = torch.randint(0, 16, (*rows, numel), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack_nibbles(numbers)
    assert packed.shape == (*rows, -(-numel // 2))
    assert torch.equal(packed[..., 0] & 15, numbers[..., 0])
    assert torch.equal(unpack_nibbles(packed, numel), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_bytes_are_read_wherever_they_lie(dtype: torch.dtype) -> None:
    numbers = torch.arange(-6, 6).to(dtype)
    for offset in range(9):
        memory = torch.cat([torch.zeros(offset, dtype=torch.uint8), to_bytes(numbers)])
        assert torch.equal(from_bytes(memory[offset:], dtype), numbers)
    assert torch.equal(from_bytes(to_bytes(numbers.view(3, 4).T), dtype), numbers.view(3, 4).T)
    rows = torch.cat([to_bytes(numbers.view(3, 4)), torch.zeros(3, 3, dtype=torch.uint8)], -1)
    assert torch.equal(from_bytes(rows[:, : -3 or None], dtype), numbers.view(3, 4))
