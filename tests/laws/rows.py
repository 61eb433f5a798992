"""A small task with every difficulty: rows of mixed length, some without a label; models that are hard to reduce."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.tasks import Task

VOCABULARY = 23
IGNORED = -100


class Rows:
    """Sample i: up to `length` labels, drawn from the seed; every seventh row has none.

    A micro-batch is as wide as its longest row, so that its shape depends on who is in it.
    """

    def __init__(self, size: int, length: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.tokens = draw.integers(0, VOCABULARY, (size, length + 1))
        self.counts = draw.integers(0, length + 1, size)
        self.counts[::7] = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        return np.where(ids < 0, 0, self.counts[ids])

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        counts = self.label_counts(ids)[:, None]
        columns = np.arange(max(1, counts.max()))
        tokens = self.tokens[np.maximum(ids, 0)]
        labels = np.where(columns < counts, tokens[:, 1 : len(columns) + 1], IGNORED)
        return {"tokens": torch.tensor(tokens[:, : len(columns)]), "labels": torch.tensor(labels)}


class Net(nn.Module):
    """Predicts each token from the one before. `kind` names what is special about its parameters."""

    def __init__(self, kind: str, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.unused = nn.Linear(7, 5) if kind == "unused" else None
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 18)
        self.down = nn.Linear(18, 12)
        self.sometimes = nn.Linear(12, 12) if kind == "sometimes" else None
        self.layers = nn.ModuleList(_layer(dropout) for _ in range(3)) if kind == "stacked" else []
        self.gate = nn.Parameter(torch.ones(1, 12)) if kind == "stacked" else 1.0  # one row for all ranks
        self.head = nn.Linear(12, VOCABULARY)
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "frozen":
            self.up.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.dropout(self.embed(tokens))
        hidden = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        if self.sometimes is not None and tokens.sum() % 2:  # other parameters in other micro-batches
            hidden = hidden + self.sometimes(hidden)
        for layer in self.layers:
            hidden = hidden + self.gate * layer(F.gelu(hidden))
        return self.head(self.dropout(hidden))


def _layer(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.Dropout(dropout))


KINDS = ("plain", "tied", "unused", "sometimes", "frozen")


@dataclass(frozen=True)
class RowsTask(Task):
    """The task, whatever the configuration and the folder are."""

    kind: str = "plain"
    dropout: float = 0.0
    size: int = 61
    length: int = 9
    unlabelled: bool = False  # not one label in any row
    full: bool = False  # all rows of the same length
    seed: int = 0
    tokenizer: Any = None

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return Net(self.kind, self.dropout)

    def samples(self, split: str) -> Rows:
        rows = Rows(self.size if split == "train" else 17, self.length, seed=len(split))
        if self.unlabelled and split == "train":
            rows.counts[:] = 0
        if self.full:
            rows.counts[:] = self.length
        return rows

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        scores = model(inputs["tokens"])
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.cross_entropy(
            wide.flatten(0, 1), inputs["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
