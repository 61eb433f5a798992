"""Decoupled momentum: each replica keeps its own momentum, and shares its strongest waves. No other optimizer.

DeMo (Peng et al. 2024, arXiv 2411.19870; the rule is that of the authors' code, github.com/bloc97/DeMo):

    d = b d + lr g_i                       the momentum of replica i, from the gradient of its own micro-batches
    q_i = the k largest coefficients of the DCT of each chunk of d
    d = d - IDCT(q_i)                      what was shared is subtracted; the rest waits
    u = IDCT(mean of q_i over the replicas that sent that coefficient)
    p = (1 - lr decay) p - lr sign(u)      decoupled weight decay

Defaults, the authors' own: b 0.999, chunks of 64 x 64 (a vector: 64), k 32. With all coefficients kept nothing waits:
that is sign descent along the mean gradient, without momentum.

Differences from that code: an index is sent in 2 bytes instead of 8. A dim is cut by its largest divisor up to the
chunk only if that is at least half of the chunk; else into equal parts with zeros behind the last (there a prime dim
is cut into ones, and nothing is saved). A 0 counts as not sent, since it is chance which zeros are the largest.
`max_grad_norm` clips the gradient of each replica times N, since there is no dense sum, and the mean of these
gradients is that of the step. Where any replica's gradient is not finite the step changes nothing.

Sent: (N - 1) k (b + 2) bytes for each chunk: of a large float32 matrix 1.2 % of its size to each other replica. It
grows with N, unlike all-reduce. Held: one copy of the parameters, where AdamW holds two. Staleness 0: every step
shares. Use it where links are the limit and N is small. A bucket's waves travel while the next bucket is transformed;
they cannot overlap the next step, which needs them. Replicas end in the same bits on processors of one kind; on
different ones sign(u) may differ where u is as small as a rounding error.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.replica import TINY, Replica, Step
from shoal.sync.base import State, Sync, mean_of
from shoal.tensors.buckets import Bucket
from shoal.wire.wire import Exchange, Wire


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """A value and an index for each coefficient, to each other rank; the momentum. No optimizer's state."""
    chunk, topk = config.strategy.demo_chunk, config.strategy.demo_topk
    sent = sum(Waves(shape, chunk, topk).sent for shape in sizes.shapes)
    each = sizes.itemsize + _index_dtype(chunk).itemsize
    return Cost(sent=(sizes.world_size - 1) * sent * each, held=sizes.nbytes)


class DeMo(Sync):
    """See the module."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.decay = config.strategy.demo_decay
        self.cut = (config.strategy.demo_chunk, config.strategy.demo_topk)
        self.max_grad_norm = 0.0
        self.momenta: list[Momentum] = []
        self.names: dict[Tensor, str] = {}

    def attach(self, replica: Replica) -> None:
        # Plain descent, with the weight decay of the optimizers that it replaces. SGD adds it to the gradient, which
        # is a sign by then: so it is decoupled.
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for optimizer in replica.optimizers
            for group in optimizer.param_groups
        ]
        self.max_grad_norm = replica.max_grad_norm
        replica.replace_optimizers([torch.optim.SGD(groups, lr=replica.schedule(0))])
        self.momenta = [Momentum(bucket, self.decay, *self.cut) for bucket in replica.buckets]
        self.names = {p: name for name, p in replica.params}

    def step(self, replica: Replica, step: Step) -> None:
        with step.timed("optimizer"):
            norm = self._share(replica, step)
        replica.update(step)
        step.grad_norm = norm

    def _share(self, replica: Replica, step: Step) -> float:
        """Leave the signs of the shared waves in the buckets; returns N times the norm of the own gradient."""
        own = replica.norm(get_total_norm([bucket.flat for bucket in replica.buckets]))
        norm = self._wire.world_size * own.item()
        clip = min(1.0, self.max_grad_norm / (norm + TINY)) if self.max_grad_norm else 1.0
        rate = replica.schedule(step.number) * self._wire.world_size * clip
        gathers = [self._start_gather(momentum.add(rate)) for momentum in self.momenta]
        received = [
            momentum.unpack(self._finish(step, *gather))
            for momentum, gather in zip(self.momenta, gathers, strict=True)
        ]
        broken = sum(not values.isfinite().all() for values, _ in received)
        finite = not replica.sum(torch.tensor(float(broken)))
        for momentum, (values, indices) in zip(self.momenta, received, strict=True):
            if finite:
                momentum.share(values, indices, self._wire.rank)
            else:
                for _, part in momentum.bucket.parts(momentum.bucket.flat):
                    part.fill_(math.nan)  # so that the update skips the step
        return norm

    def state_dict(self) -> State:
        return {f"momentum/{self.names[p]}": part for m in self.momenta for p, part in m.bucket.parts(m.flat)}

    def load_state_dict(self, states: Sequence[State]) -> None:
        # With another number of ranks each continues with the mean, as what is shared is a mean over its senders.
        same = len(states) == self._wire.world_size
        state = states[self._wire.rank] if same else mean_of(states)
        for name, part in self.state_dict().items():
            part.copy_(state[name])

    def _start_gather(self, part: Tensor) -> tuple[Tensor, Exchange]:
        whole = part.new_empty(self._wire.world_size * part.numel())
        return whole, self._wire.start_all_gather(whole, part)

    def _finish(self, step: Step, whole: Tensor, exchange: Exchange) -> Tensor:
        with step.timed("communication"):
            exchange.wait()
        return whole.view(self._wire.world_size, -1)


class Momentum:
    """The momentum of one bucket on this replica. It sends the values of all parameters, then their indices."""

    def __init__(self, bucket: Bucket, decay: float, chunk: int, topk: int) -> None:
        self.bucket = bucket
        self.decay = decay
        self.flat = torch.zeros_like(bucket.flat)
        self.waves = [Waves(p.shape, chunk, topk) for p in bucket.params]
        self.index = _index_dtype(chunk)

    def add(self, rate: float) -> Tensor:
        """Replace g in the bucket by b d + `rate` g, and return its strongest waves, packed."""
        flat = self.bucket.flat.mul_(rate).add_(self.flat, alpha=self.decay)
        strongest = [waves.strongest(part) for waves, part in zip(self.waves, self._parts(flat), strict=True)]
        values = torch.cat([value.flatten() for value, _ in strongest])
        indices = torch.cat([index.flatten() for _, index in strongest]).to(self.index)
        return torch.cat([values.view(torch.uint8), indices.view(torch.uint8)])

    def unpack(self, of_all: Tensor) -> tuple[Tensor, Tensor]:
        """The values and indices, [N, sent] each, of what every rank sent, uint8 [N, bytes].

        If a number of a gradient is not finite, every wave of its chunk is not: all ranks see it here alike.
        """
        end = self.flat.itemsize * sum(waves.sent for waves in self.waves)
        values, indices = of_all[:, :end].flatten(), of_all[:, end:].flatten()
        ranks = len(of_all)
        return values.view(self.flat.dtype).view(ranks, -1), indices.view(self.index).view(ranks, -1).long()

    def share(self, values: Tensor, indices: Tensor, rank: int) -> None:
        """Keep what `rank`, this one, did not send, and write the signs of the mean of all into the bucket."""
        self.flat.copy_(self.bucket.flat)
        sizes = [waves.sent for waves in self.waves]
        parts = zip(self.waves, self._parts(self.flat), self._parts(self.bucket.flat), strict=True)
        sent = zip(values.split(sizes, 1), indices.split(sizes, 1), strict=True)
        for (waves, left, sign), (value, index) in zip(parts, sent, strict=True):
            left.sub_(waves.mean(value[rank : rank + 1], index[rank : rank + 1]))
            sign.copy_(waves.mean(value, index).sign_())

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [part for _, part in self.bucket.parts(flat)]


class Waves:
    """One parameter cut into chunks, as the coefficients of their two-dimensional DCT (type II, orthonormal).

    A matrix is cut along both dims. A vector counts as a matrix of one row, a tensor of more dims as the matrix of
    its first dim and all others.
    """

    def __init__(self, shape: Sequence[int], chunk: int, topk: int) -> None:
        self.shape = tuple(shape)
        self.rows, self.columns = (
            (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        )
        (self.down, self.high), (self.across, self.wide) = _cut(self.rows, chunk), _cut(self.columns, chunk)
        self.area = self.high * self.wide
        self.kept = min(topk, self.area)
        self.sent = self.down * self.across * self.kept

    def transform(self, tensor: Tensor) -> Tensor:
        """The coefficients [chunks, area] of `tensor` [shape]."""
        beyond = (0, self.across * self.wide - self.columns, 0, self.down * self.high - self.rows)
        grid = F.pad(tensor.reshape(self.rows, self.columns), beyond)
        grid = grid.view(self.down, self.high, self.across, self.wide)
        high, wide = _basis(self.high).to(tensor), _basis(self.wide).to(tensor)
        return torch.einsum("ki,aibj,lj->abkl", high, grid, wide).reshape(-1, self.area)

    def inverse(self, waves: Tensor) -> Tensor:
        """The tensor [shape] of which `waves` [chunks, area] are the coefficients."""
        grid = waves.view(self.down, self.across, self.high, self.wide)
        high, wide = _basis(self.high).to(waves), _basis(self.wide).to(waves)
        padded = torch.einsum("ki,abkl,lj->aibj", high, grid, wide)
        padded = padded.reshape(self.down * self.high, self.across * self.wide)
        return padded[: self.rows, : self.columns].reshape(self.shape)

    def strongest(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The largest coefficients of each chunk of `tensor`: their values and indices, [chunks, kept] each."""
        waves = self.transform(tensor)
        indices = waves.abs().topk(self.kept, dim=1, sorted=False).indices
        return waves.gather(1, indices), indices

    def mean(self, values: Tensor, indices: Tensor) -> Tensor:
        """The tensor [shape] whose coefficients are the means over the ranks that sent them: [N, sent] of each.

        The ranks are added one after the other, and none sends an index twice: the bits depend on no thread.
        """
        total = values.new_zeros(self.down * self.across, self.area)
        senders = torch.zeros_like(total)
        for value, index in zip(values, indices, strict=True):
            places = index.view(-1, self.kept)
            total.scatter_add_(1, places, value.view(-1, self.kept))
            senders.scatter_add_(1, places, (value != 0).to(value).view(-1, self.kept))
        return self.inverse(total.div_(senders.clamp_(min=1)))


def _cut(size: int, chunk: int) -> tuple[int, int]:
    """How many parts a dim is cut into, and how long they are; the last may reach beyond the end."""
    if size <= chunk:
        return 1, size
    divisor = max(d for d in range(1, chunk + 1) if size % d == 0)
    if 2 * divisor >= chunk:
        return size // divisor, divisor
    parts = -(-size // chunk)
    return parts, -(-size // parts)


@cache
def _basis(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [frequency, place], float64."""
    frequency, place = (
        torch.arange(size, dtype=torch.float64)[:, None],
        torch.arange(size, dtype=torch.float64),
    )
    basis = torch.cos(math.pi / size * (place + 0.5) * frequency) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    basis[basis.abs() < 1e-12] = 0  # else a rounding error would become a sign
    return basis


def _index_dtype(chunk: int) -> torch.dtype:
    return torch.int16 if chunk * chunk <= 2**15 else torch.int32
