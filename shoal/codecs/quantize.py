"""Sent as small whole numbers with a scale for each block: `int8`, `int4`."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal.codecs.base import ChunkCodec, Subject
from shoal.codecs.bits import from_bytes, pack_nibbles, to_bytes, unpack_nibbles
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed

BLOCK = 512
SCALE = torch.float32


def blocked(tensor: Tensor, block: int) -> Tensor:
    """Float [..., n] in blocks, the last one filled up with zeros: [..., ceil(n / block), block]."""
    short = -tensor.shape[-1] % block
    return (pad(tensor, (0, short)) if short else tensor).unflatten(-1, (-1, block))


class Quantizer(ChunkCodec):
    """Whole numbers q in [-L, L], and for each block of `block` elements a scale s, its largest magnitude over L:

        q = round(x / s), x' = q s        nearest, biased: error feedback is on unless refused
        q = floor(x / s + u), u in [0, 1) stochastic: x' is x on average, no feedback needed

    L is 127 for int8 and 7 for int4. Blocks of 512 and unbiased rounding are those of QSGD (Alistarh et al.
    2017; the block size from memory), the scale by the largest magnitude is what ZeRO++ and others use.

    Bytes: 1 (int8) or 1/2 (int4) for an element, and 4/block for its scale. Costs about ten passes. The loss of
    int8 does not show in training; int4 is for slow links and for outer gradients (Streaming DiLoCo). Smaller
    blocks follow uneven tensors better.

    Scales travel in float32, everything else is in the precision of the tensor. A block that holds a number that
    is not finite, or one too large for float32, decodes to NaN; a block of numbers too small for float32 decodes
    to zero.
    """

    def __init__(self, subject: Subject, bits: int, block: int, stochastic: bool) -> None:
        super().__init__(subject.dtype, counts=stochastic)
        self.bits = bits
        self.block = block
        self.biased = not stochastic
        self.seed = derive_seed(subject.seed, "rounding", subject.rank)

    @property
    def levels(self) -> int:
        """The largest of the whole numbers."""
        return (1 << self.bits - 1) - 1

    def encode(self, tensor: Tensor) -> Tensor:
        # The scales, then the numbers.
        blocks = blocked(tensor, self.block)
        scales = blocks.abs().amax(-1).div_(self.levels).to(SCALE)
        numbers = blocks / scales.to(self._dtype).unsqueeze(-1)
        numbers = numbers.round_() if self.biased else numbers.add_(self._noise(numbers)).floor_()
        numbers = numbers.clamp_(-self.levels, self.levels).nan_to_num_(0.0)  # 0 / 0 is a block of zeros
        self._calls += 1
        return torch.cat([to_bytes(scales), self._pack(numbers.flatten(-2)[..., : tensor.shape[-1]])], -1)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        cut = self._scale_bytes(numel)
        scales = from_bytes(payload[..., :cut], SCALE).to(self._dtype)
        blocks = blocked(self._unpack(payload[..., cut:], numel), self.block)
        return blocks.mul_(scales.unsqueeze(-1)).flatten(-2)[..., :numel]

    def nbytes(self, numel: int) -> int:
        return self._scale_bytes(numel) + -(-numel * self.bits // 8)

    def _noise(self, like: Tensor) -> Tensor:
        """In [0, 1), a function of (seed, rank, call) alone; made on the CPU, so that no device matters."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self._calls))
        return torch.rand(like.shape, dtype=like.dtype, generator=generator).to(like.device)

    def _scale_bytes(self, numel: int) -> int:
        return -(-numel // self.block) * SCALE.itemsize

    def _pack(self, numbers: Tensor) -> Tensor:
        if self.bits == 8:
            return to_bytes(numbers.to(torch.int8))
        return pack_nibbles(numbers.add_(self.levels).to(torch.uint8))

    def _unpack(self, packed: Tensor, numel: int) -> Tensor:
        if self.bits == 8:
            return packed.view(torch.int8).to(self._dtype)
        return unpack_nibbles(packed, numel).to(self._dtype).sub_(self.levels)


def int8(options: StrategyConfig, subject: Subject) -> Quantizer:
    """With 8 bits."""
    return Quantizer(subject, 8, options.block or BLOCK, options.stochastic)


def int4(options: StrategyConfig, subject: Subject) -> Quantizer:
    """With 4 bits."""
    return Quantizer(subject, 4, options.block or BLOCK, options.stochastic)
