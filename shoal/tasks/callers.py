"""A task made of a caller's own model, data sets and functions: what `shoal.Trainer` trains."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from shoal.config import RunConfig
from shoal.data.shards import Split
from shoal.errors import UserError
from shoal.models.export import describe, export
from shoal.models.families import family_of
from shoal.tasks.base import Task
from shoal.tasks.surroundings import Surroundings

IGNORED = -100  # a label that counts nothing, as in transformers
PRESENT = "shoal_present"  # beside a micro-batch's tensors: which of its rows are samples [rows]
ASKED = "shoal.Trainer"

Collate = Callable[[list[Any]], Mapping[str, Any]]
SumOfLoss = Callable[[Any, dict[str, Tensor]], Tensor]


class Rows(Protocol):
    """A data set: rows by their number, each a mapping of what the model takes, with "labels"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class EvalPrediction(NamedTuple):
    """What `compute_metrics` gets: arrays with a row for each sample, of dtype object where rows differ in shape."""

    predictions: np.ndarray
    label_ids: np.ndarray


@dataclass(frozen=True)
class Given:
    """What a caller hands to the Trainer; see there."""

    model: nn.Module
    train: Rows | None
    eval: Rows | None
    collate: Collate | None = None
    loss: Callable[..., Tensor] | None = None  # compute_loss_func
    metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None  # preprocess_logits_for_metrics
    tokenizer: PreTrainedTokenizerBase | None = None


class CallersTask(Task):
    """Trains by the caller's loss, or the model's own, as a sum over labels."""

    def __init__(self, config: RunConfig, folder: Path, given: Given) -> None:
        super().__init__(config, folder)
        self._given = given
        self._collate: Collate = given.collate or default_data_collator
        layout = config.layout
        for flag, size in {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp}.items():
            if size > 1:
                found = "the loss is computed of the whole model and of whole rows"
                raise UserError(f"{ASKED}, {flag}={size}", found, 'leave it out, or take strategy="zero3"')
        if config.train.label_smoothing:
            found, change = (
                "the loss is the model's own or the caller's",
                "smooth labels in compute_loss_func",
            )
            raise UserError(f"{ASKED}, label_smoothing={config.train.label_smoothing:g}", found, change)
        own = given.loss is None
        self._loss, self._shifts = (
            own_loss(given.model, self._first_row()) if own else (self._callers_loss, False)
        )

    def model(self) -> nn.Module:
        return self._given.model

    def samples(self, split: Split) -> "Samples":
        rows = self._given.train if split == "train" else self._given.eval
        return self.of(rows if rows is not None else [])

    def of(self, rows: Rows) -> "Samples":
        """The samples of a data set."""
        return Samples(rows, self._collate, self._shifts)

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The summed loss of the rows that are samples. Without any it is 0, and still depends on the parameters."""
        rows, count = present(inputs)
        found = self._loss(model, rows)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found if count else found * 0

    def outputs(self, model: Any, inputs: dict[str, Tensor]) -> list[Any]:
        """The prediction and the labels of each row, as lists; `preprocess_logits_for_metrics` has been applied."""
        rows = {name: tensor for name, tensor in inputs.items() if name != PRESENT}
        found = model(**{name: tensor for name, tensor in rows.items() if name != "labels"})
        logits = logits_of(found)
        labels = rows.get("labels", torch.zeros(len(logits)))
        if self._given.reduce is not None:
            logits = self._given.reduce(logits, labels)
        return [list(pair) for pair in zip(logits.tolist(), labels.tolist(), strict=True)]

    def _callers_loss(self, model: Any, rows: dict[str, Tensor]) -> Tensor:
        assert self._given.loss is not None
        outputs = model(**{name: tensor for name, tensor in rows.items() if name != "labels"})
        return self._given.loss(outputs, rows["labels"], num_items_in_batch=1)

    def _first_row(self) -> dict[str, Tensor]:
        """The first row that there is, collated."""
        for rows in (self._given.train, self._given.eval):
            if rows is not None and len(rows):
                return dict(self._collate([rows[0]]))
        raise UserError(ASKED, "there is no row to train on", "give a train_dataset with rows")


class ScoredTask(CallersTask):
    """Gathers predictions in every evaluation, for the caller's `compute_metrics`."""

    def predict(self, model: Any, inputs: dict[str, Tensor]) -> list[Any]:
        return self.outputs(model, inputs)

    def metrics(self, sums: Sequence[float], labels: int, predictions: Sequence[Any]) -> dict[str, float]:
        found = super().metrics(sums, labels, predictions)
        assert self._given.metrics is not None
        scores = self._given.metrics(arrays(predictions))
        return found | {f"eval/{name.removeprefix('eval_')}": float(score) for name, score in scores.items()}


class CallersSurroundings(Surroundings):
    """Saves the configuration and tokenizer of a Hugging Face model, and exports a folder that transformers loads."""

    def __init__(self, config: RunConfig, folder: Path, given: Given) -> None:
        super().__init__(config, folder)
        self._tokenizer = given.tokenizer
        self._of_family = False
        if isinstance(given.model, PreTrainedModel):
            given.model.config.architectures = [type(given.model).__name__]
            try:
                family_of(given.model.config)
                self._of_family = True
            except KeyError:
                pass

    def weights(self) -> str:
        return "the caller's"

    def describe(self, model: Any, folder: Path) -> None:
        if self._of_family:
            describe(model, self._tokenizer, folder)

    def export(self, checkpoint: Path, folder: Path, summary: dict[str, Any], model: Any | None) -> None:
        if self._of_family:
            export(checkpoint / "model", folder, summary)
        else:
            super().export(checkpoint, folder, summary, model)


class Samples:
    """The rows of a caller's data set. An absent row is a copy of the first one, marked as none."""

    def __init__(self, rows: Rows, collate: Collate, shifts: bool) -> None:
        self._rows = rows
        self._collate = collate
        self._shifts = shifts
        self._counts = np.full(len(rows), -1)

    def __len__(self) -> int:
        return len(self._rows)

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        """Count the labels of each row when it is first asked for, which reads the row once more."""
        for i in np.unique(ids[ids >= 0]).tolist():
            if self._counts[i] < 0:
                self._counts[i] = count_labels(self._collate([self._rows[i]])["labels"], self._shifts)
        return np.where(ids < 0, 0, self._counts[ids]) if len(self._rows) else np.zeros_like(ids)

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        """What the caller's collator makes of the rows, and which of them are samples."""
        made = self._collate([self._rows[int(i)] for i in np.maximum(ids, 0)])
        return {**made, PRESENT: torch.from_numpy(ids >= 0)}


def count_labels(labels: Tensor, shifts: bool) -> int:
    """Count the labels in a batch. Where the model `shifts` them, no token predicts the first label of a row."""
    counted = labels[:, 1:] if shifts else labels
    return counted.numel() if counted.is_floating_point() else int((counted != IGNORED).sum())


def present(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The rows of a micro-batch that are samples, and how many; the first row where none is."""
    rows = {name: tensor for name, tensor in inputs.items() if name != PRESENT}
    chosen = inputs[PRESENT]
    count = int(chosen.sum())
    if count == len(chosen):
        return rows, count
    return {name: tensor[chosen] if count else tensor[:1] for name, tensor in rows.items()}, count


def logits_of(outputs: Any) -> Tensor:
    """What a model predicts: the `logits` of transformers' outputs, a tensor, or the first one of several."""
    if isinstance(outputs, Tensor):
        return outputs
    found = getattr(outputs, "logits", None)
    return (
        found
        if found is not None
        else logits_of(next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs)))
    )


def arrays(predictions: Sequence[Any]) -> EvalPrediction:
    """The predictions and the labels of samples, as `CallersTask.outputs` has them."""
    return EvalPrediction(
        _array([each[0] for each in predictions]), _array([each[1] for each in predictions])
    )


def _array(rows: list[Any]) -> np.ndarray:
    try:
        return np.array(rows)
    except ValueError:  # ragged
        found = np.empty(len(rows), dtype=object)
        found[:] = [np.array(row) for row in rows]
        return found


@torch.no_grad()
def own_loss(model: nn.Module, row: dict[str, Tensor]) -> tuple[SumOfLoss, bool]:
    """The loss that a model returns, as a sum over labels; and whether it shifts them by one token.

    Found by trying it on one row: a model of transformers divides the sum by the `num_items_in_batch` that it is
    given, or it takes the mean. Raises UserError where it returns none.
    """
    change = "give it rows with labels, or compute_loss_func(outputs, labels, num_items_in_batch)"
    if "labels" not in row:
        raise UserError(ASKED, f"a row has no labels, but {', '.join(row) or 'nothing'}", change)

    def tried(inputs: dict[str, Tensor], **more: Any) -> Tensor:
        found = getattr(model(**inputs, **more), "loss", None) if _takes(model, "labels") else None
        if found is None:
            raise UserError(ASKED, f"{type(model).__name__} returns no loss", change)
        return found

    was_training = model.training
    model.eval()
    row = {name: tensor.to(next(model.parameters()).device) for name, tensor in row.items()}
    mean = tried(row)
    takes_count = _takes(model, "num_items_in_batch")
    sums = takes_count and not torch.allclose(tried(row, num_items_in_batch=0.5), mean, rtol=1e-3)
    shifts = _shifts(tried, row)
    model.train(was_training)

    def sum_of_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if sums:
            return model(**inputs, num_items_in_batch=1).loss
        return model(**inputs).loss * count_labels(inputs["labels"], shifts)

    return sum_of_loss, shifts


def _shifts(tried: Callable[[dict[str, Tensor]], Tensor], row: dict[str, Tensor]) -> bool:
    """Whether the loss ignores the first label of a row, as that of a model that predicts the next token."""
    labels = row["labels"]
    if labels.dim() < 2 or labels.shape[1] < 2 or labels.is_floating_point():
        return False
    first = [
        labels.index_fill(1, torch.zeros(1, dtype=torch.long, device=labels.device), v) for v in (IGNORED, 0)
    ]
    without, with_it = (tried(row | {"labels": each}) for each in first)
    return bool(torch.allclose(without, with_it, rtol=1e-6, equal_nan=True))


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)
