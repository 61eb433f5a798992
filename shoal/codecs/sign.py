"""Sent as one bit an element: `sign`."""

import torch
from torch import Tensor

from shoal.codecs.base import ChunkCodec, Subject
from shoal.codecs.bits import from_bytes, pack_bits, to_bytes, unpack_bits
from shoal.codecs.quantize import BLOCK, SCALE, blocked
from shoal.config import StrategyConfig


class Sign(ChunkCodec):
    """The sign of every element, and for each block of d elements their mean magnitude:

        x' = (||x||_1 / d) sign(x)        sign(0) is +1: there is no third value in a bit

    With error feedback, the default, this is EF-signSGD (Karimireddy et al. 2019, algorithm 1). In a sum over the
    ranks, where the sum of a chunk is encoded again with a feedback of its own, it is the compression of 1-bit
    Adam (Tang et al. 2021, algorithm 1; `codec_momentum` and `codec_warmup` add its momentum and its warm-up,
    see `shoal.codecs.momentum`). The papers scale a whole layer; here each block has a scale of its own, since a
    bucket holds parameters of unlike size.

    Without error feedback (`vote`) it is signSGD with majority vote (Bernstein et al. 2018, algorithm 1, from
    memory): the sign of a sum is the one that most ranks sent. The paper sends no scale and steps by the sign
    alone. Here the votes of a block are scaled by the sum of its scales: the learning rate then means what it
    means elsewhere, and NaN shows. A tie is decided by the ranks' scales.

    Bytes: 1/8 for an element, and 4/block for its scale: 1/30 of float32 with blocks of 512. Costs about ten
    passes. Use it with error feedback on slow links; the vote is for many ranks, some of which may send
    anything.
    """

    def __init__(self, subject: Subject, block: int, vote: bool) -> None:
        super().__init__(subject.dtype)
        self.block = block
        self.vote = vote

    def encode(self, tensor: Tensor) -> Tensor:
        # The scales, then the bits.
        numel = tensor.shape[-1]
        sums = blocked(tensor.abs(), self.block).sum(-1, dtype=torch.float64)
        scales = (sums / self._counts(numel).to(sums.device)).to(SCALE)
        return torch.cat([to_bytes(scales), pack_bits(tensor >= 0)], -1)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        cut = self._scale_bytes(numel)
        scales = from_bytes(payload[..., :cut], SCALE).to(self._dtype)
        signs = unpack_bits(payload[..., cut:], numel).to(self._dtype).mul_(2).sub_(1)
        return blocked(signs, self.block).mul_(scales.unsqueeze(-1)).flatten(-2)[..., :numel]

    def merge(self, parts: Tensor) -> Tensor:
        total = parts.sum(0)
        if not self.vote:
            return total
        votes = parts.sign().sum(0)
        return torch.where(votes == 0, total, votes).sign() * parts.abs().sum(0)

    def nbytes(self, numel: int) -> int:
        return self._scale_bytes(numel) + -(-numel // 8)

    def _counts(self, numel: int) -> Tensor:
        """How many elements each block really holds."""
        counts = torch.full((-(-numel // self.block),), self.block)
        counts[-1:] -= -numel % self.block
        return counts

    def _scale_bytes(self, numel: int) -> int:
        return -(-numel // self.block) * SCALE.itemsize


def sign(options: StrategyConfig, subject: Subject) -> Sign:
    """Without error feedback the sum is the vote of the majority."""
    return Sign(subject, options.block or BLOCK, options.error_feedback is False)
