"""What a worker and a server say to each other: a header of fixed size, numbers if it tells some, then a tensor.

A header is not counted as bytes sent, as those of the transport are not.
"""

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

HEADER_BYTES = 88


class Kind(IntEnum):
    """What a worker asks for."""

    PUSH = 1  # to take its gradient, which follows, for its step `clock`
    PULL = 2  # the parameters, once they contain every worker's steps before `needed`
    EXCHANGE = 3  # both
    SKIP = 4  # both, but to count its step only, whose gradient is not finite
    PEEK = 5  # the parameters as they are, at once
    STATE = 6  # the optimizers' state
    LEAVE = 7  # nothing more


PUSHES = (Kind.PUSH, Kind.EXCHANGE)
PULLS = (Kind.PULL, Kind.EXCHANGE, Kind.SKIP, Kind.PEEK)


class _Header:
    FORMAT: ClassVar[struct.Struct]

    def pack(self) -> Tensor:
        """As bytes."""
        return torch.frombuffer(bytearray(self.FORMAT.pack(*astuple(self))), dtype=torch.uint8)  # type: ignore[call-overload]

    @classmethod
    def unpack(cls, header: Tensor) -> Self:
        """What `pack` was called on."""
        return cls(*cls.FORMAT.unpack(header.numpy().tobytes()))


@dataclass(frozen=True)
class Request(_Header):
    """From a worker."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<8qd16x")

    kind: int
    worker: int
    clock: int = 0
    needed: int = 0
    version: int = 0  # of the parameters that a gradient was taken at
    labels: int = 0  # of the worker's share
    step_labels: int = 0
    told: int = 0  # how many numbers follow
    norm: float = float("nan")  # of the gradient over all servers


@dataclass(frozen=True)
class Reply(_Header):
    """From a server."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<9q2d")

    version: int
    clock: int  # before which no step is taken any more
    workers: int  # that have steps to take
    staleness: int  # of the last push, in updates
    bound: int  # how many steps a worker may be ahead of the last one; negative: as many as it likes
    told: int  # how many numbers follow
    text: int  # bytes of text that follow; negative: they say why nothing can go on
    last: int  # after so many steps all stop; negative: nobody has asked for it
    waits: int  # 1: this is no answer yet, but the server is there
    rate: float  # of the last update
    squares: float  # of this server's part of the gradient; negative: not known any more
