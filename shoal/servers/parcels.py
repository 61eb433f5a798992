"""How a gradient travels from a worker to a server: as it is, or encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcels:
    """For the gradients of one range, [n] of `dtype`: `encode` makes `nbytes` bytes of one, `decode` undoes it.

    The worker's `encode` may remember what it left out; both ends agree on everything else.
    """

    numel: int
    dtype: torch.dtype
    nbytes: int
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def plain(cls, numel: int, dtype: torch.dtype) -> "Parcels":
        """As it is."""
        return cls(numel, dtype, numel * dtype.itemsize)

    def buffer(self, payload: Tensor) -> Tensor:
        """Where a gradient [n] is to be written that will travel as `payload` (bytes)."""
        return payload.view(self.dtype) if self.encode is None else torch.zeros(self.numel, dtype=self.dtype)

    def wrap(self, gradient: Tensor, payload: Tensor) -> None:
        """Have it in `payload`; if it travels as it is it is there already."""
        if self.encode is not None:
            payload.copy_(self.encode(gradient))

    def unwrap(self, payload: Tensor) -> Tensor:
        """The gradient that came."""
        return payload.view(self.dtype) if self.decode is None else self.decode(payload)
