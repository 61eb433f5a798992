"""Sent in fewer bits a number: `bf16`, `fp16`; and as it is: `none`."""

import torch
from torch import Tensor

from shoal.codecs.base import Codec, Subject
from shoal.codecs.bits import from_bytes, to_bytes


class Plain(Codec):
    """As it is. A sum over the ranks is the all-reduce that there is without codecs.

    Bytes: b for an element of b bytes. Exact. Use it wherever the link is not what a step waits for.
    """

    combine = "dense"
    biased = False

    def encode(self, tensor: Tensor) -> Tensor:
        """A copy, so that what is being sent does not change."""
        return to_bytes(tensor.clone())

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """The very numbers."""
        return from_bytes(payload, self.dtype)

    def nbytes(self, numel: int) -> int:
        """The size of the tensor."""
        return numel * self.dtype.itemsize


class Cast(Codec):
    """Rounded to the nearest 16-bit float: x' = float16(x).

    Bytes: 2 for an element, half of float32. The payload is low, the sum is not: every rank sums its chunk in
    full precision, so that the error is that of two roundings however many ranks there are (torch's own 16-bit
    all-reduce rounds at every hop of the ring: measured 3.1e-3 against 1.7e-3 with 4 ranks). Costs one pass
    each way.

    bf16 keeps the range of float32 and 8 bits of its digits: the one to take. fp16 keeps 11 bits and overflows
    above 65504, which then is not finite for all, and the step is skipped; below 6e-8 it is zero. Error
    feedback is off unless asked for: the rounding is biased, but far below the noise of a gradient.
    """

    combine = "chunks"
    biased = False

    def __init__(self, subject: Subject, to: torch.dtype) -> None:
        super().__init__(subject.dtype)
        self.to = to

    def encode(self, tensor: Tensor) -> Tensor:
        """Float [..., n] to uint8 [..., 2 n]."""
        return to_bytes(tensor.to(self.to))

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """Uint8 [..., 2 n] to float [..., n]."""
        return from_bytes(payload, self.to).to(self.dtype)

    def nbytes(self, numel: int) -> int:
        """Two for each element."""
        return numel * self.to.itemsize
