"""What is in each step: (seed, position) -> the sample ids of its micro-batches and their number of labels."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from shoal.data.order import derive_seed, permute

ABSENT = -1  # a row of the last step beyond the end of the data: it has no labels


class Samples(Protocol):
    """What a task makes of its rows: samples addressed by an integer.

    What a sample holds may differ from one epoch to the next, as masks and negatives do: `epochs` has the epoch of
    each id. None is epoch 0, in which evaluations take place.
    """

    def __len__(self) -> int: ...

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        """The number of labels of each sample (int64, the shape of `ids`; 0 for an absent row)."""
        ...

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        """One micro-batch: tensors whose first dim is the rows named by `ids` [micro_batch_size]."""
        ...


@dataclass(frozen=True)
class Batch:
    """One step: `ids` and `epochs`, int64 [micro-batches, micro_batch_size], of `samples`, and the labels in all.

    `position` is that of the first sample in the endless sequence of epochs.
    """

    step: int
    samples: Samples
    ids: np.ndarray
    epochs: np.ndarray
    labels: int
    position: int

    @property
    def next_position(self) -> int:
        """The position after its last sample; absent rows do not count."""
        return self.position + int((self.ids != ABSENT).sum())

    def micro_batch(self, v: int) -> dict[str, Tensor]:
        """The collated micro-batch `v`."""
        return self.samples.collate(self.ids[v], self.epochs[v])

    def label_count(self, micro_batches: slice) -> int:
        """The labels of some of its micro-batches."""
        return int(self.samples.label_counts(self.ids[micro_batches], self.epochs[micro_batches]).sum())

    def empty_micro_batch(self) -> dict[str, Tensor]:
        """A micro-batch without samples, for a rank that has none left while the others need it to take part."""
        return _empty(self.samples, self.ids.shape[1])


class Batches:
    """The batches of a run. Every epoch is its own permutation; a batch may straddle two epochs.

    `epochs` is where the data ends (a fraction is allowed), or None for a run that is bounded by its steps. The run
    begins, or goes on, `at` a step and a position: what lies between two positions never depends on the batch size.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        epochs: float | None = None,
        at: tuple[int, int] = (0, 0),
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.shape = (global_batch_size // micro_batch_size, micro_batch_size)
        self.global_batch_size = global_batch_size
        self.end = None if epochs is None else round(epochs * len(samples))
        self.first_step, self.first_position = at

    @property
    def steps(self) -> int | None:
        """The number of steps after which the data ends, or None if the run is bounded by its steps."""
        if self.end is None:
            return None
        left = max(0, self.end - self.first_position)
        return self.first_step + -(-left // self.global_batch_size)

    def empty_micro_batch(self) -> dict[str, Tensor]:
        """A micro-batch without samples, of the shape of all."""
        return _empty(self.samples, self.shape[1])

    def at(self, step: int) -> Batch:
        """The batch of `step` (from 0): a function of the seed and its position, whatever was asked before."""
        first = self.first_position + (step - self.first_step) * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        ids, epochs = (
            self._ids(positions).reshape(self.shape),
            positions.reshape(self.shape) // max(1, len(self.samples)),
        )
        labels = int(self.samples.label_counts(ids, epochs).sum())
        return Batch(step, self.samples, ids, epochs, labels, first)

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        size = len(self.samples)
        ids = np.full(positions.shape, ABSENT, dtype=np.int64)
        inside = positions < (np.inf if self.end is None else self.end)
        for epoch in np.unique(positions[inside] // size):
            rows = inside & (positions // size == epoch)
            ids[rows] = permute(positions[rows] % size, size, derive_seed(self.seed, "epoch", int(epoch)))
        return ids


def _empty(samples: Samples, rows: int) -> dict[str, Tensor]:
    return samples.collate(np.full(rows, ABSENT, dtype=np.int64))
