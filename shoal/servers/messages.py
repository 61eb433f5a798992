"""The messages between a worker and a server: a header of fixed size, then numbers and a tensor, where there are any.

Headers are not counted as bytes sent, as those of the transport are not.
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

    PUSH = 1  # to process its gradient, which follows, for its step `clock`
    PULL = 2  # the parameters, once they contain every worker's steps before `needed`
    EXCHANGE = 3  # both
    SKIP = 4  # both, but only to count its step, whose gradient is not finite
    PEEK = 5  # the parameters as they are, at once
    STATE = 6  # the optimizers' state
    LEAVE = 7  # nothing more: it leaves


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
    version: int = 0  # of the parameters at which a gradient was computed
    labels: int = 0  # of the worker's share
    step_labels: int = 0
    numbers: int = 0  # how many numbers follow
    norm: float = float("nan")  # of the gradient over all servers


@dataclass(frozen=True)
class Reply(_Header):
    """From a server."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<9q2d")

    version: int
    clock: int  # the first step whose pushes still count
    workers: int  # that have steps left
    staleness: int  # of the last push, in updates
    bound: int  # how many steps a worker may be ahead of the last one; negative: as many as it likes
    numbers: int  # how many numbers follow
    text: int  # bytes of text that follow; negative: they say why nothing can go on
    last: int  # the number of steps after which all stop; negative: nobody has asked for it
    waits: int  # 1: not the answer yet, but a sign that the server is alive
    rate: float  # of the last update
    squares: float  # of this server's part of the gradient; negative: not known any more
