"""How a gradient travels from a worker to a server: as it is, or encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PushFormat:
    """The format of the gradients [n] of one range: `encode` makes `nbytes` bytes of one, `decode` undoes it.

    The worker's `encode` may have state, such as what it left out; everything else is alike at both ends.
    """

    numel: int
    dtype: torch.dtype
    nbytes: int
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def plain(cls, numel: int, dtype: torch.dtype) -> "PushFormat":
        """The format that does not encode."""
        return cls(numel, dtype, numel * dtype.itemsize)

    def buffer(self, payload: Tensor) -> Tensor:
        """The buffer [n] for a gradient that will be sent as `payload` (bytes): the payload itself if not encoded."""
        return payload.view(self.dtype) if self.encode is None else torch.zeros(self.numel, dtype=self.dtype)

    def wrap(self, gradient: Tensor, payload: Tensor) -> None:
        """Encode `gradient` into `payload`; if it is not encoded it is there already."""
        if self.encode is not None:
            payload.copy_(self.encode(gradient))

    def unwrap(self, payload: Tensor) -> Tensor:
        """Decode the gradient [n] that came as `payload`."""
        return payload.view(self.dtype) if self.decode is None else self.decode(payload)
