"""A task unlike language modelling: an epoch draws which labels of a row count; it predicts, and has a score."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from laws.packed import Packed, PackedTask
from laws.rows import IGNORED
from torch import Tensor

from shoal.data.order import derive_seed
from shoal.models.heads import logits
from shoal.models.isolation import packed_inputs


class Drawn(Packed):
    """Packed rows of whose labels two in three count, drawn from (seed, sample, epoch)."""

    def _drawn(self, ids: np.ndarray, epochs: np.ndarray | None) -> np.ndarray:
        epochs = np.zeros_like(ids) if epochs is None else epochs
        kept = [
            np.random.default_rng(derive_seed(7, "labels", int(i), int(e))).random(self.labels.shape[1])
            < 2 / 3
            for i, e in zip(ids.flat, epochs.flat, strict=True)
        ]
        labels = np.where(np.array(kept), self.labels[ids.flatten()], IGNORED)
        return np.where(ids.flatten()[:, None] < 0, IGNORED, labels)

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        return (self._drawn(ids, epochs) != IGNORED).sum(1).reshape(ids.shape)

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        columns = super().collate(ids)
        return columns | {"labels": torch.from_numpy(self._drawn(ids, epochs))}


@dataclass(frozen=True)
class Tagging(PackedTask):
    """Scores how many labels a row gets right; the best checkpoint is the one that gets most."""

    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("eval/accuracy", "max")

    def samples(self, split: str) -> Drawn:
        return Drawn(self.size if split == "train" else 17, self.length, seed=len(split))

    def measure(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        rows = _scored(model, inputs)
        return rows.sum(0)

    def predict(self, model: Any, inputs: dict[str, Tensor]) -> list[Any]:
        return [{"right": int(right)} for _, right in _scored(model, inputs).tolist()]

    def metrics(self, sums: Sequence[float], labels: int, predictions: Sequence[Any]) -> dict[str, float]:
        assert sum(each["right"] for each in predictions) == sums[1]
        text = "\n".join(json.dumps(each) for each in predictions)
        return {
            "eval/loss": sums[0] / labels,
            "eval/accuracy": sums[1] / labels,
            "eval/predicted": len(predictions),
            "eval/digest": zlib.crc32(text.encode()),
        }


def _scored(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of each row its loss and how many labels it gets right: float64 [rows, 2]."""
    packed = packed_inputs(inputs["input_ids"], inputs["documents"], inputs.get("position_ids"))
    scores, labels = logits(model, packed).double().log_softmax(-1), inputs["labels"]
    known = labels != IGNORED
    losses = -scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * known
    right = (scores.argmax(-1) == labels) & known
    return torch.stack([losses.sum(1), right.sum(1).double()], dim=1)
