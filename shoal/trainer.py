"""`shoal.Trainer`: the shape of trainer that people know, on the parts of `shoal train`."""

import atexit
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from shoal import checkpoint
from shoal.api import Summary
from shoal.config import Resolved, check_options, load_config
from shoal.engines.environment import is_worker
from shoal.engines.joining import joined
from shoal.engines.local import check_folder
from shoal.engines.signals import Stop
from shoal.engines.worker import end
from shoal.errors import Preempted, UserError
from shoal.system.run_folder import SUMMARY
from shoal.tasks import Entry
from shoal.tasks.callers import CallersSurroundings, CallersTask, Given, Rows, ScoredTask, arrays
from shoal.training.evaluate import Measured, everyone, measure
from shoal.training.jobs import begin_run, train_run
from shoal.training.run import Run

Callback = Callable[
    [dict[str, Any]], Any
]  # hears each record of metrics.jsonl; a true answer ends the training


class PredictionOutput(NamedTuple):
    """What `predict` found: arrays with a row for each sample, and the metrics."""

    predictions: np.ndarray
    label_ids: np.ndarray
    metrics: dict[str, float]


class Trainer:
    """Trains a torch model on a data set, as one worker among those that torchrun (or any engine) started, or alone.

        trainer = shoal.Trainer(
            model, {"max_steps": 500, "strategy": "diloco", "output_dir": "runs/x"}, train_dataset=rows
        )
        summary = trainer.train()
        trainer.save_model("my-model")

    `model` is one of transformers, or any module with `compute_loss_func`. `args` are settings by the names of flags.
    Rows are mappings of what the model takes, with "labels"; `data_collator` makes a batch of some, by default as
    transformers does. It must not draw at random: what a row holds follows from its number. The loss is the model's
    own, or `compute_loss_func(outputs, labels, num_items_in_batch)`: a sum over labels divided by that number.
    `compute_metrics` gets an `EvalPrediction` of numpy arrays, after `preprocess_logits_for_metrics(logits, labels)`,
    and returns numbers by name. `callbacks` hear every record of metrics.jsonl on rank 0; a true answer ends the
    training after the step in hand. Raises UserError for settings that do not fit, a cut by --tp, --pp or --cp among
    them. Every rank makes the same calls.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Mapping[str, Any] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        *,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        for name, rows in {"train_dataset": train_dataset, "eval_dataset": eval_dataset}.items():
            if rows is not None and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
                found = f"{name} is a {type(rows).__name__}, without a length or rows by number"
                raise UserError("shoal.Trainer", found, "give a list, a torch Dataset or a datasets.Dataset")
        self.model = model
        self._given = Given(
            model,
            train_dataset,
            eval_dataset,
            data_collator,
            compute_loss_func,
            compute_metrics,
            preprocess_logits_for_metrics,
            processing_class,
        )
        about = {"model": type(model).__name__, "data": [_named(train_dataset)]}
        self._resolved: Resolved = load_config(None, **about | dict(args or {}))
        check_options(self._resolved)
        self._callbacks = _Callbacks(list(callbacks))
        self._open = ExitStack()

    def train(self) -> Summary:
        """Train to the end, and return what summary.json says; ended by a callback, where it stands.

        The folder has metrics, checkpoints and, as `final/`, the model. Raises Preempted where the process was asked
        to stop, saved.
        """
        check_folder(self._resolved)
        run, stop = self._run, _Asked(self._callbacks)
        try:
            train_run(run, self._resolved, stop)
        except Preempted:
            if stop.asked or not self._all(self._callbacks.ended):
                raise
            progress = run.progress
            return Summary(
                {"steps": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}, run.folder
            )
        run.mesh.wire("world").wait_for_first()
        return Summary(json.loads((run.folder / SUMMARY).read_text(encoding="utf-8")), run.folder)

    def evaluate(self, eval_dataset: Rows | None = None) -> dict[str, float]:
        """The metrics of a data set, by default that of the trainer, under the one model of all workers."""
        rows = self._given.eval if eval_dataset is None else eval_dataset
        if rows is None or not len(rows):
            raise UserError(
                "shoal.Trainer.evaluate", "there is no row to evaluate on", "give an eval_dataset"
            )
        task, found = self._task, self._measured(rows, predicts=self._given.metrics is not None)
        return task.metrics(found.sums, found.labels, found.predictions)

    def predict(self, test_dataset: Rows) -> PredictionOutput:
        """What the model predicts of every row of a data set, in its order, and the metrics."""
        found = self._measured(test_dataset, predicts=True)
        metrics = self._task.metrics(found.sums, found.labels, found.predictions)
        return PredictionOutput(*arrays(found.predictions), metrics)

    def save_model(self, output_dir: str | Path) -> None:
        """Write the trained model to a folder that is new or empty, as transformers loads it."""
        run, folder = self._run, Path(output_dir)
        if run.mesh.is_first:
            last = checkpoint.find("latest", run.folder, run.screen.say)
            if last is None:
                raise UserError(
                    f"save_model({str(folder)!r})", "nothing was trained yet", "call train() first"
                )
            run.built.surroundings.export(last, folder, {}, None)
        run.mesh.wire("world").wait_for_first()

    def close(self) -> None:
        """Part from the other workers; done at the process's end otherwise."""
        self._open.close()

    @cached_property
    def _run(self) -> Run:
        """The run, put together when it is first needed; this process meets the others here."""
        if self._given.train is None or not len(self._given.train):
            raise UserError("shoal.Trainer", "there is no row to train on", "give a train_dataset with rows")
        kind = ScoredTask if self._given.metrics is not None else CallersTask
        entry = Entry(
            lambda config, verbose: Path(_key(self._given)),
            lambda config, folder: kind(config, folder, self._given),
            lambda config, folder: CallersSurroundings(config, folder, self._given),
        )
        key = _key(self._given)
        mesh = self._open.enter_context(joined(self._resolved.config, key))
        atexit.register(self.close)
        run = begin_run(self._resolved, mesh, Path(key), entry)
        run.trackers.append(self._callbacks)
        return run

    @property
    def _task(self) -> CallersTask:
        task = self._run.task
        assert isinstance(task, CallersTask)
        return task

    def _measured(self, rows: Rows, *, predicts: bool) -> Measured:
        run = self._run
        predict = self._task.outputs if predicts else None
        with run.sync.shared_model(run.replica):
            found = measure(run.built, self._task.of(rows), everyone(run.mesh), predict=predict)
        assert found is not None
        return found

    def _all(self, said: bool) -> bool:
        """What rank 0 says."""
        return self._run.mesh.wire("world").share_text("yes" if said else "") == "yes"


class _Callbacks:
    """The caller's functions as a tracker."""

    def __init__(self, functions: list[Callback]) -> None:
        self._functions = functions
        self.ended = False  # whether one has asked to end

    def write(self, record: dict[str, Any]) -> None:
        """Hand the record to each."""
        answers = [function(dict(record)) for function in self._functions]
        self.ended = self.ended or any(answers)

    def close(self) -> None:
        """There is nothing to close."""


class _Asked(Stop):
    """Whether the process was asked to stop, or a callback has asked to end."""

    def __init__(self, callbacks: _Callbacks) -> None:
        super().__init__(end if is_worker() else None)
        self._callbacks = callbacks

    def __call__(self) -> bool:
        return self.asked or self._callbacks.ended


def _named(rows: Rows | None) -> str:
    return "nothing" if rows is None else f"{type(rows).__name__} of {len(rows):,} rows"


def _key(given: Given) -> str:
    """What tells one data set from another: its kind and length, and the fingerprint of one of `datasets`."""
    rows = given.train
    parts = [_named(rows), str(getattr(rows, "_fingerprint", ""))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
