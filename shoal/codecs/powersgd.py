"""Sent as two thin factors: `powersgd`."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs.base import LinearCodec, State, Subject
from shoal.codecs.bits import from_bytes, to_bytes
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed

RANK = 4
SAVING = 2.0  # a matrix must shrink to less than half: as torch's own hook has it (min_compression_rate)


@dataclass(frozen=True)
class Part:
    """A parameter in the flat tensor: the elements [start, stop), as a matrix of `rows`; `rank` 0: not factored."""

    start: int
    stop: int
    rows: int
    rank: int

    @property
    def columns(self) -> int:
        """Of the matrix: all dims but the first."""
        return (self.stop - self.start) // self.rows

    def of(self, flat: Tensor) -> Tensor:
        """The view of `flat` that it is: [rows, columns]."""
        return flat[self.start : self.stop].view(self.rows, -1)


def parts_of(shapes: tuple[torch.Size, ...], rank: int, saving: float) -> list[Part]:
    """Which parameters are factored: matrices (the first dim against the rest) that shrink `saving` times."""
    parts, start = [], 0
    for shape in shapes:
        stop = start + shape.numel()
        if stop == start:
            continue
        rows = shape[0] if len(shape) > 1 else 1
        columns = (stop - start) // rows
        kept = min(rank, rows, columns)
        pays = len(shape) > 1 and (rows + columns) * kept * saving < rows * columns
        parts.append(Part(start, stop, rows, kept if pays else 0))
        start = stop
    return parts


class PowerSGD(LinearCodec):
    """Each matrix M [n, m], summed over the ranks i, in the best r columns that one power iteration finds:

        P = sum_i M_i Q; P^ = orthonormal columns of P; Q = sum_i M_i^T P^; M' = P^ Q^T

    Q stays for the next time (warm start); at first it is random, the same on all ranks (Vogels et al. 2019,
    algorithm 1). The feedback keeps M_i - P^ P^T M_i, what the factors cannot say of this rank's matrix;
    torch's hook and the authors' code keep M_i - mean M' instead. Both residuals have the same sum over the
    ranks, and so the same results, but theirs grow without bound where ranks differ, until rounding tells. Full
    rank is exact.

    Only matrices that shrink to less than half are factored (`SAVING`); vectors and the rest are summed
    unfactored, with P. Orthonormal columns come from Householder QR, which needs no epsilon and copes with zeros. A
    column of Q that is zero or not finite starts anew at random: else it would stay so for ever.

    Bytes: two all-reduces, together r (n + m) of n m elements for a matrix. Costs three products of n m r, and
    a QR. It is summed by all-reduce, so its bytes do not grow with the number of workers: use it where they are
    many, with ranks 1 to 4 on slow links. Workers end in the same bits where their processors round products
    alike (machines of one kind); others may differ in the last bit. Point to point, each side has its own Q, and
    the payload is both factors.
    """

    def __init__(self, subject: Subject, rank: int, saving: float = SAVING) -> None:
        super().__init__(subject.dtype)
        parts = parts_of(subject.shapes, rank, saving)
        self.matrices = [part for part in parts if part.rank]
        self.raw = [part for part in parts if not part.rank]
        self.seed = subject.seed
        self.factors: Tensor | None = None  # every Q [m, r], one after the other

    def encode(self, tensor: Tensor) -> Tensor:
        # Every P^, what is sent unfactored, every Q.
        columns = [_orthonormal(part.of(tensor) @ q) for part, q in self._starts(tensor)]
        self.factors = self._project(tensor, columns)
        raw = [part.of(tensor) for part in self.raw]
        return to_bytes(_joined([*columns, *raw, self.factors], tensor))

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        numbers = from_bytes(payload, self._dtype)
        cut = self._first_numel()
        columns, raw = self._split_first(numbers[:cut])
        return self._whole(columns, raw, numbers[cut:], numel)

    def rounds(self, tensor: Tensor) -> Generator[Tensor, None, Tensor]:
        products = [part.of(tensor) @ q for part, q in self._starts(tensor)]
        own_raw = [part.of(tensor).clone() for part in self.raw]
        first = _joined([*products, *own_raw], tensor)
        yield first
        products, raw = self._split_first(first)
        columns = [_orthonormal(product) for product in products]
        own_factors = self._project(tensor, columns)
        self.factors = own_factors.clone()
        if self.matrices:
            yield self.factors
        tensor.copy_(self._whole(columns, raw, self.factors, tensor.numel()))
        return self._whole(columns, own_raw, own_factors, tensor.numel())

    def round_bytes(self, numel: int) -> list[int]:
        second = sum(part.columns * part.rank for part in self.matrices)
        return [each * self._dtype.itemsize for each in (self._first_numel(), second) if each]

    def held(self, numel: int) -> int:
        return sum(part.columns * part.rank for part in self.matrices) * self._dtype.itemsize

    def state_dict(self) -> State:
        return {} if self.factors is None else {"factors": self.factors}

    def load_state_dict(self, state: State) -> None:
        self.factors = state.get("factors")

    def _starts(self, tensor: Tensor) -> list[tuple[Part, Tensor]]:
        """Each matrix's Q to start from, its columns orthonormal so that their size never matters."""
        if self.factors is None:
            self.factors = tensor.new_zeros(self.held(tensor.numel()) // self._dtype.itemsize)
        starts = []
        for i, (part, q) in enumerate(zip(self.matrices, self._split_factors(self.factors), strict=True)):
            usable = torch.isfinite(q).all(0) & (q != 0).any(0)
            if not usable.all():
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "powersgd", i))
                fresh = torch.randn(q.shape, generator=generator, dtype=self._dtype).to(q.device)
                q = torch.where(usable, q, fresh)
            starts.append((part, _orthonormal(q)))
        return starts

    def _project(self, tensor: Tensor, columns: list[Tensor]) -> Tensor:
        """Every M^T P^."""
        pairs = zip(self.matrices, columns, strict=True)
        return _joined([part.of(tensor).T @ each for part, each in pairs], tensor)

    def _whole(self, columns: list[Tensor], raw: list[Tensor], factors: Tensor, numel: int) -> Tensor:
        """Every P^ Q^T and what is raw, each in its place."""
        whole = factors.new_empty(numel)
        split = self._split_factors(factors)
        for part, p, q in zip(self.matrices, columns, split, strict=True):
            torch.matmul(p, q.T, out=part.of(whole))
        for part, values in zip(self.raw, raw, strict=True):
            part.of(whole).copy_(values)
        return whole

    def _first_numel(self) -> int:
        raw = sum(part.stop - part.start for part in self.raw)
        return raw + sum(part.rows * part.rank for part in self.matrices)

    def _split_first(self, first: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        shapes = [(part.rows, part.rank) for part in self.matrices]
        shapes += [(part.rows, part.columns) for part in self.raw]
        pieces = first.split([rows * columns for rows, columns in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return views[: len(self.matrices)], views[len(self.matrices) :]

    def _split_factors(self, factors: Tensor) -> list[Tensor]:
        pieces = factors.split([part.columns * part.rank for part in self.matrices])
        return [piece.view(-1, part.rank) for piece, part in zip(pieces, self.matrices, strict=True)]


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """One flat tensor; empty where there are none."""
    return torch.cat([like.new_empty(0), *(piece.reshape(-1) for piece in pieces)])


def powersgd(options: StrategyConfig, subject: Subject) -> PowerSGD:
    """Of the rank that the options name."""
    return PowerSGD(subject, options.rank or RANK)
