"""The published rules once more, in NumPy and float64, one process playing all ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Rule = Callable[[Array], Array]  # x -> what is decoded of what x is encoded to


def nearest(levels: int, block: int) -> Rule:
    """Whole numbers up to `levels`, with a scale in float32 for each block."""

    def rule(x: Array) -> Array:
        out = np.zeros_like(x)
        for start in range(0, len(x), block):
            part = x[start : start + block]
            scale = np.float64(np.float32(np.abs(part).max() / levels))
            if scale > 0:
                out[start : start + block] = np.clip(np.round(part / scale), -levels, levels) * scale
        return out

    return rule


def signs(block: int) -> Rule:
    """The sign, times the mean magnitude of the block, in float32."""

    def rule(x: Array) -> Array:
        out = np.zeros_like(x)
        for start in range(0, len(x), block):
            part = x[start : start + block]
            out[start : start + block] = np.where(part >= 0, 1.0, -1.0) * np.float32(np.abs(part).mean())
        return out

    return rule


def largest(count: int) -> Rule:
    """The `count` elements of largest magnitude."""

    def rule(x: Array) -> Array:
        places = np.argsort(-np.abs(x), kind="stable")[:count]
        out = np.zeros_like(x)
        out[places] = x[places]
        return out

    return rule


def two_bits(count: int) -> Rule:
    """The `count` largest, each as its sign times the mean of those on its side of the mean magnitude."""

    def rule(x: Array) -> Array:
        out = largest(count)(x)
        sizes = np.abs(out[out != 0])
        for side in (np.abs(out) <= sizes.mean(), np.abs(out) > sizes.mean()):
            chosen = side & (out != 0)
            out[chosen] = np.sign(x[chosen]) * np.abs(x[chosen]).mean()
        return out

    return rule


@dataclass
class TwoStages:
    """Sums in chunks: each rank encodes with its residual, the owner of a chunk encodes the sum with another."""

    rule: Rule
    feedback: bool
    residuals: dict[int, Array] = field(default_factory=dict)
    server: dict[int, Array] = field(default_factory=dict)

    def sum(self, tensors: list[Array]) -> Array:
        numel, count = len(tensors[0]), len(tensors)
        chunk = -(-numel // count)
        sent = []
        for rank, tensor in enumerate(tensors):
            pending = np.zeros(count * chunk)
            pending[:numel] = tensor + (self.residuals.get(rank, 0.0) if self.feedback else 0.0)
            rows = [self.rule(row) for row in pending.reshape(count, chunk)]
            sent.append(np.concatenate(rows))
            self.residuals[rank] = (pending - sent[rank])[:numel]
        total = np.sum(sent, axis=0)
        total[numel:] = 0
        out = []
        for owner, row in enumerate(total.reshape(count, chunk)):
            pending = row + (self.server.get(owner, 0.0) if self.feedback else 0.0)
            out.append(self.rule(pending))
            self.server[owner] = pending - out[owner]
        return np.concatenate(out)[:numel]


@dataclass
class Gathered:
    """Sums of what each rank sends to all, with a residual; with a momentum it is DGC."""

    rule: Rule
    momentum: float = 0.0
    masking: bool = True
    residuals: dict[int, Array] = field(default_factory=dict)
    velocities: dict[int, Array] = field(default_factory=dict)

    def sum(self, tensors: list[Array]) -> Array:
        total = np.zeros_like(tensors[0])
        for rank, tensor in enumerate(tensors):
            u = self.momentum * self.velocities.get(rank, 0.0) + tensor
            v = self.residuals.get(rank, 0.0) + u
            sent = self.rule(v)
            total += sent
            self.residuals[rank] = v - sent
            self.velocities[rank] = np.where(sent != 0, 0.0, u) if self.masking else u
        return total


@dataclass
class LowRank:
    """PowerSGD on one matrix, with the feedback of the authors' code: each rank keeps its matrix less the mean."""

    factor: Array  # Q [columns, rank]
    residuals: dict[int, Array] = field(default_factory=dict)

    def sum(self, matrices: list[Array]) -> Array:
        pending = [m + self.residuals.get(rank, 0.0) for rank, m in enumerate(matrices)]
        columns, _ = np.linalg.qr(np.sum([m @ self.factor for m in pending], axis=0))
        self.factor = np.sum([m.T @ columns for m in pending], axis=0)
        total = columns @ self.factor.T
        for rank, matrix in enumerate(pending):
            self.residuals[rank] = matrix - total / len(matrices)
        return total
