"""What a mechanism costs, as arithmetic: each states its own, and a test holds it to what is measured."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """What a cost depends on: the parameters of a replica, and how many replicas there are."""

    shapes: tuple[torch.Size, ...]  # of every trained parameter, tied ones once
    world_size: int
    itemsize: int = 4  # bytes of an element

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Cost:
    """Of one rank: bytes sent in an average step, bytes held beside replica and optimizer, staleness in steps."""

    sent: float
    held: int = 0
    staleness: int = 0


def ring(nbytes: float, world_size: int) -> float:
    """What a rank sends to sum `nbytes` over all ranks: a reduce-scatter and an all-gather."""
    return 2 * nbytes * (world_size - 1) / world_size
