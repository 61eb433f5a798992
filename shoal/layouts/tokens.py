"""The hidden states of a micro-batch, whole or cut by tokens over the ranks of a line: from one to the other.

Each function here is what its backward pass is not: where one gathers the other sums up and scatters.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.wire.wire import Wire


class TensorAxis:
    """The ranks that compute a layer together, and the tokens of the forward pass that runs."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.size, self.index = wire.world_size, wire.rank
        self.tokens = Tokens(self, 0, 0)

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' parts [n, ...] one after the other: [size * n, ...]."""
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        self.wire.start_all_gather(whole.view(-1), part.contiguous().view(-1)).wait()
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """The sum over the ranks of this one's part of `whole` [size * n, ...]: [n, ...].

        (By direct exchange: gloo's own way sums the whole on every rank.)
        """
        sent = whole.contiguous()
        received = torch.empty_like(sent)
        part = sent.numel() // self.size
        self.wire.start_exchange(received.view(-1), [part] * self.size, sent.view(-1)).wait()
        return reduce(torch.add, received.chunk(self.size))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self.wire.sum(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the one of the first rank."""
        self.wire.broadcast(tensor)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch [rows, length], laid end to end and cut: each rank of the line has as many.

    Hidden states are [1, share, H] in part, the last ones filled up with zeros, and [rows, length, H] whole.
    """

    line: TensorAxis
    rows: int
    length: int

    @property
    def share(self) -> int:
        """How many tokens a rank has."""
        return -(-self.rows * self.length // self.line.size)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of the ranks' parts."""
        return self.line.gather(part[0])[: self.rows * self.length].view(self.rows, self.length, -1)

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum of the ranks' wholes."""
        missing = self.share * self.line.size - self.rows * self.length
        flat = whole.flatten(0, 1)
        return self.line.scatter(F.pad(flat, (0, 0, 0, missing)) if missing else flat)[None]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of what all ranks have whole."""
        first = self.line.index * self.share
        part = whole.flatten(0, 1)[first : first + self.share]
        return F.pad(part, (0, 0, 0, self.share - len(part)))[None]


class Enter(torch.autograd.Function):
    """From what all ranks have whole to each rank's part."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tokens: Tokens) -> Tensor:
        """This rank's part, which is no view."""
        ctx.tokens = tokens
        return tokens.own(whole).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all parts."""
        return ctx.tokens.gather(grad), None


class Leave(torch.autograd.Function):
    """From the ranks' parts to a whole with which all of them do the same."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tokens) -> Tensor:
        """All parts."""
        ctx.tokens = tokens
        return tokens.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Of a gradient that all ranks have alike, this rank's part."""
        return ctx.tokens.own(grad), None


class Gather(torch.autograd.Function):
    """From the ranks' parts to a whole with which each of them does something else."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tokens) -> Tensor:
        """All parts."""
        ctx.tokens = tokens
        return tokens.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sum of the ranks' gradients, this rank's part of it."""
        return ctx.tokens.scatter(grad), None


class Scatter(torch.autograd.Function):
    """From what each rank adds to a whole to each rank's part of the sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tokens: Tokens) -> Tensor:
        """This rank's part."""
        ctx.tokens = tokens
        return tokens.scatter(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all parts."""
        return ctx.tokens.gather(grad), None


class Sum(torch.autograd.Function):
    """From what each rank adds to the sum, with which all of them do the same."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor, line: TensorAxis) -> Tensor:
        """The sum."""
        return line.sum(addend.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As it is."""
        return grad, None


class Share(torch.autograd.Function):
    """From what all ranks have alike to the same, with which each of them does something else."""

    @staticmethod
    def forward(ctx: Any, line: TensorAxis, *alike: Tensor) -> tuple[Tensor, ...]:
        """As they are."""
        ctx.line = line
        return tuple(each.view_as(each) for each in alike)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The sums of the ranks' gradients, in one exchange and in at least float32."""
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        flat = ctx.line.sum(torch.cat([grad.flatten().to(wide) for grad in grads]))
        parts = flat.split([grad.numel() for grad in grads])
        return (None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True)))


class Columns(torch.autograd.Function):
    """From the columns [..., n] that each rank has to all of them, with which all ranks do the same.

    `count` is how many there are; the ranks before the last have as many each, the last one what is left.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, line: TensorAxis, count: int) -> Tensor:
        """All columns."""
        most = -(-count // line.size)
        ctx.own = slice(line.index * most, line.index * most + own.shape[-1])
        filled = F.pad(own, (0, most - own.shape[-1]))
        return line.gather(filled.movedim(-1, 0)).movedim(0, -1)[..., :count]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Those of this rank."""
        return grad[..., ctx.own].contiguous(), None, None
