"""Hidden states whole on each rank, or cut by tokens over the ranks that compute a layer: from one to the other.

The two passes of each function here are each other's transpose: where one gathers, the other scatters a sum.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.wire.wire import Wire


class TensorGroup:
    """The ranks that compute a layer together, and the tokens of the forward pass that runs."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.size, self.index = wire.world_size, wire.rank
        self.tokens = Tokens(self, 0, 0)

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' parts [n, ...] one after the other: [size * n, ...]."""
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        self.wire.start_all_gather(whole.view(-1), part.contiguous().view(-1), "tokens").wait()
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """The sum over the ranks of this one's part of `whole` [size * n, ...]: [n, ...].

        (By direct exchange: gloo's own way sums the whole on every rank.)
        """
        sent = whole.contiguous()
        received = torch.empty_like(sent)
        counts = [sent.numel() // self.size] * self.size
        self.wire.start_exchange(received.view(-1), counts, sent.view(-1), "sums of tokens").wait()
        return reduce(torch.add, received.chunk(self.size))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch [rows, length], laid end to end and cut: each rank has as many.

    Hidden states are [1, share, H] in part, the last ones filled up with zeros, and [rows, length, H] whole.
    """

    group: TensorGroup
    rows: int
    length: int

    @property
    def share(self) -> int:
        """How many tokens a rank has."""
        return -(-self.rows * self.length // self.group.size)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of the ranks' parts."""
        return self.group.gather(part[0])[: self.rows * self.length].view(self.rows, self.length, -1)

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum of the ranks' wholes."""
        missing = self.share * self.group.size - self.rows * self.length
        flat = whole.flatten(0, 1)
        return self.group.scatter(F.pad(flat, (0, 0, 0, missing)) if missing else flat)[None]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of what all ranks have whole."""
        first = self.group.index * self.share
        part = whole.flatten(0, 1)[first : first + self.share]
        return F.pad(part, (0, 0, 0, self.share - len(part)))[None]


class SplitTokens(torch.autograd.Function):
    """From a whole that all ranks have to each rank's part."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tokens: Tokens) -> Tensor:
        """This rank's part, which is no view."""
        ctx.tokens = tokens
        return tokens.own(whole).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all parts."""
        return ctx.tokens.gather(grad), None


class JoinTokens(torch.autograd.Function):
    """From the ranks' parts to the whole, of which all ranks then compute the same."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tokens) -> Tensor:
        """All parts."""
        ctx.tokens = tokens
        return tokens.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Of a gradient that all ranks have alike, this rank's part."""
        return ctx.tokens.own(grad), None


class GatherTokens(torch.autograd.Function):
    """From the ranks' parts to the whole, of which each rank then computes something else."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tokens) -> Tensor:
        """All parts."""
        ctx.tokens = tokens
        return tokens.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sum of the ranks' gradients, this rank's part of it."""
        return ctx.tokens.scatter(grad), None


class ScatterTokens(torch.autograd.Function):
    """From each rank's term of a sum to each rank's part of the sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tokens: Tokens) -> Tensor:
        """This rank's part."""
        ctx.tokens = tokens
        return tokens.scatter(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all parts."""
        return ctx.tokens.gather(grad), None


class SumPartials(torch.autograd.Function):
    """From each rank's term to the sum, of which all ranks then compute the same."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor, group: TensorGroup) -> Tensor:
        """The sum."""
        return group.wire.sum(addend.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As it is."""
        return grad, None


class SumGradients(torch.autograd.Function):
    """Tensors alike on all ranks, of which each rank computes something else: their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, group: TensorGroup, *alike: Tensor) -> tuple[Tensor, ...]:
        """As they are."""
        ctx.group = group
        return tuple(each.view_as(each) for each in alike)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The sums of the ranks' gradients, in one exchange and in at least float32."""
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        flat = ctx.group.wire.sum(torch.cat([grad.flatten().to(wide) for grad in grads]))
        parts = flat.split([grad.numel() for grad in grads])
        return (None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True)))


class GatherColumns(torch.autograd.Function):
    """From each rank's columns [..., n] to all `count` columns, of which all ranks then compute the same.

    The ranks before the last have equally many, the last one the rest.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: TensorGroup, count: int) -> Tensor:
        """All columns."""
        most = -(-count // group.size)
        ctx.own = slice(group.index * most, group.index * most + own.shape[-1])
        filled = F.pad(own, (0, most - own.shape[-1]))
        return group.gather(filled.movedim(-1, 0)).movedim(0, -1)[..., :count]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Those of this rank."""
        return grad[..., ctx.own].contiguous(), None, None
