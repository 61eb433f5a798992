"""Sent as a few elements: the largest (`topk`), or some drawn at random (`randomk`)."""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.codecs.base import Codec, GatherCodec, LinearCodec, Subject
from shoal.codecs.bits import from_bytes, pack_bits, to_bytes, unpack_bits
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed

DENSITY = 0.01
INDEX = torch.int32
NUMBER = torch.int64


@dataclass(frozen=True)
class Density:
    """The share of the elements that is sent: `final`, after `warmup` calls in which it falls geometrically.

    In DGC's own warm-up four epochs send 25, 6.25, 1.6 and 0.4 %, then 0.1 % is sent: the powers 1/5 to 5/5 of
    the final density. Here the power rises with each call.
    """

    final: float
    warmup: int = 0

    def count(self, numel: int, call: int) -> int:
        """How many of `numel` elements call number `call` (from 0) sends: at least one."""
        power = min(1.0, (call + 1) / (self.warmup + 1))
        return min(numel, max(1, round(self.final**power * numel)))


class Sparse(Codec):
    """What sends a share of the elements that depends on the number of calls, which is saved."""

    def __init__(self, subject: Subject, density: Density) -> None:
        super().__init__(subject.dtype, counts=True)
        self.density = density


class TopK(Sparse, GatherCodec):
    """The k elements of largest magnitude of a bucket, as they are, with their places in int32.

        x' = x at the k places, 0 elsewhere        k = density times the number of elements, 0.01 by default

    With `chunk` they are chosen in each run of that many elements on its own, so that a large layer does not get all.
    With error feedback it is Stich et al. 2018 ("Sparsified SGD with Memory"); with `codec_momentum` it is Deep
    Gradient Compression (see `shoal.codecs.momentum`), and `codec_warmup` adds its warm-up. NaN counts as largest.

    Bytes: (b + 4) k, all-gathered: (N - 1)(b + 4) k sent. It beats the ring of an all-reduce, 2 (N - 1)/N of b
    an element, only where density < 2 b / (N (b + 4)): in float32 below 1/N. Costs a pass and a selection, on a
    CPU the slowest part of all codecs. Use it on slow links with few ranks, and for the outer gradients of
    local training.
    """

    def __init__(self, subject: Subject, density: Density, chunk: int = 0) -> None:
        super().__init__(subject, density)
        self.chunk = chunk  # 0: the whole tensor

    def encode(self, tensor: Tensor) -> Tensor:
        # The values, then their places.
        assert tensor.numel() <= torch.iinfo(INDEX).max, "places are sent in int32: make buckets smaller"
        places = self._largest(tensor)
        self._calls += 1
        return torch.cat([to_bytes(tensor[places]), to_bytes(places.to(INDEX))])

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        total = torch.zeros(numel, dtype=self._dtype, device=payload.device)
        self.add(payload, total)
        return total

    def add(self, payload: Tensor, total: Tensor) -> None:
        # Without a dense tensor in between; the places of one payload differ, so the order cannot matter.
        values, places = self._parted(payload)
        total.index_add_(0, places, values)

    def nbytes(self, numel: int) -> int:
        return self._count(numel) * (self._dtype.itemsize + INDEX.itemsize)

    def _count(self, numel: int) -> int:
        """How many of `numel` elements are sent next."""
        chunks, rest = divmod(numel, self.chunk or numel)
        whole = chunks * self.density.count(self.chunk or numel, self._calls)
        return whole + (self.density.count(rest, self._calls) if rest else 0)

    def _largest(self, tensor: Tensor) -> Tensor:
        """The places of the largest elements in each chunk of `tensor` [n]."""
        size = self.chunk or tensor.numel()
        sizes = tensor.abs()
        end = len(sizes) - len(sizes) % size
        found = []
        for first, rows in ((0, sizes[:end].view(-1, size)), (end, sizes[end:][None])):
            if rows.numel():
                count = self.density.count(rows.shape[1], self._calls)
                starts = torch.arange(first, first + rows.numel(), rows.shape[1], device=tensor.device)
                found.append((rows.topk(count, sorted=False).indices + starts[:, None]).flatten())
        return torch.cat(found)

    def _parted(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and their places."""
        cut = payload.numel() * self._dtype.itemsize // (self._dtype.itemsize + INDEX.itemsize)
        return from_bytes(payload[:cut], self._dtype), from_bytes(payload[cut:], INDEX)


class TwoBits(TopK):
    """`topk` with two bits a value: its sign, and which of two magnitudes it is nearer to.

        v' = sign(v) a where |v| <= the mean of all |v|, else sign(v) b        a, b: the mean of |v| on either side

    With `diloco` it makes SparseLoCo (Sarfi et al. 2025): see `shoal.sync.diloco`. Bytes: 4 1/4 k, and 2 b for the
    magnitudes. Use it for the outer gradients of local training, whose few large elements are what matters.
    """

    def encode(self, tensor: Tensor) -> Tensor:
        # The two magnitudes, a bit a sign, a bit a magnitude, the places.
        whole = super().encode(tensor)
        values, places = self._parted(whole)
        sizes = values.abs().double()  # whose sum stays finite
        high = sizes > sizes.mean()
        means = [(sizes * chosen).sum() / chosen.sum().clamp(min=1) for chosen in (~high, high)]
        bits = [pack_bits(values < 0), pack_bits(high)]
        return torch.cat([to_bytes(torch.stack(means).to(self._dtype)), *bits, to_bytes(places)])

    def add(self, payload: Tensor, total: Tensor) -> None:
        head = 2 * self._dtype.itemsize
        count = self._count_in(payload.numel() - head)
        packed = -(-count // 8)
        negative, high = (unpack_bits(payload[head + i * packed :][:packed], count) for i in range(2))
        means = from_bytes(payload[:head], self._dtype)
        values = torch.where(high > 0, means[1], means[0]) * (1 - 2 * negative.to(self._dtype))
        total.index_add_(0, from_bytes(payload[head + 2 * packed :], INDEX), values)

    def nbytes(self, numel: int) -> int:
        count = self._count(numel)
        return 2 * self._dtype.itemsize + 2 * -(-count // 8) + count * INDEX.itemsize

    @staticmethod
    def _count_in(nbytes: int) -> int:
        """How many elements take so many bytes: eight of them 34, r more 4 r + 2."""
        eights, rest = divmod(nbytes, 8 * INDEX.itemsize + 2)
        return int(8 * eights + max(0, rest - 2) // INDEX.itemsize)


class RandomK(Sparse, LinearCodec):
    """k elements of a bucket, drawn anew each time, the same on all ranks: so that values can be summed as they are.

        x' = x at the k places, 0 elsewhere                  with error feedback, the default
        x' = (n / k) x at the k places, 0 elsewhere          without: x' is x on average, at n/k times the variance

    (Stich et al. 2018; Wangni et al. 2018.) Bytes: an all-reduce of b k, no places; point to point 8 more, for
    the number of the draw. Costs little. Use it as the baseline that `topk` has to beat, or with many ranks,
    where gathering would cost more than it saves. It needs more steps than `topk` at the same density.
    """

    def __init__(self, subject: Subject, density: Density, unbiased: bool) -> None:
        super().__init__(subject, density)
        self.biased = not unbiased
        self.seed = derive_seed(subject.seed, "randomk")

    def encode(self, tensor: Tensor) -> Tensor:
        # The number of the draw, then the values.
        places = self._draw(tensor.numel(), self.density.count(tensor.numel(), self._calls), self._calls)
        number = torch.tensor([self._calls], dtype=NUMBER, device=tensor.device)
        self._calls += 1
        return torch.cat([to_bytes(number), to_bytes(_chosen(tensor, places))])

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        number = int(from_bytes(payload[: NUMBER.itemsize], NUMBER))
        values = from_bytes(payload[NUMBER.itemsize :], self._dtype)
        return self._placed(values, self._draw(numel, values.numel(), number), numel)

    def rounds(self, tensor: Tensor) -> Generator[Tensor, None, Tensor]:
        numel = tensor.numel()
        places = self._draw(numel, self.density.count(numel, self._calls), self._calls)
        self._calls += 1
        values = _chosen(tensor, places)
        own = self._placed(values, places, numel)
        yield values
        tensor.copy_(self._placed(values, places, numel))
        return own

    def round_bytes(self, numel: int) -> list[int]:
        return [self.density.count(numel, self._calls) * self._dtype.itemsize]

    def nbytes(self, numel: int) -> int:
        return NUMBER.itemsize + super().nbytes(numel)

    def _draw(self, numel: int, count: int, number: int) -> Tensor:
        """The places of draw `number`. NumPy draws them without a permutation of all."""
        generator = np.random.Generator(np.random.PCG64(derive_seed(self.seed, number)))
        return torch.from_numpy(generator.choice(numel, count, replace=False, shuffle=False))

    def _placed(self, values: Tensor, places: Tensor, numel: int) -> Tensor:
        scale = 1.0 if self.biased else numel / values.numel()
        whole = torch.zeros(numel, dtype=values.dtype, device=values.device)
        whole[places.to(values.device)] = values * scale
        return whole


def _chosen(tensor: Tensor, places: Tensor) -> Tensor:
    """The elements at `places`; all NaN if any element is not finite, which the draw might miss."""
    chosen = tensor[places.to(tensor.device)]
    return torch.where(torch.isfinite(tensor).all(), chosen, torch.nan)


def topk(options: StrategyConfig, subject: Subject) -> TopK:
    """The largest elements, each in two bits on request."""
    return (TwoBits if options.two_bits else TopK)(subject, _density(options), options.topk_chunk)


def randomk(options: StrategyConfig, subject: Subject) -> RandomK:
    """Without error feedback what is drawn is scaled up."""
    return RandomK(subject, _density(options), options.error_feedback is False)


def _density(options: StrategyConfig) -> Density:
    return Density(options.density or DENSITY, options.codec_warmup)
