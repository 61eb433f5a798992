"""Tasks: rows -> samples -> micro-batch -> summed loss and label count -> metrics.

A task is one file here and one line in `TASKS`. The loop, the batches and the evaluation know no task.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from shoal.config import RunConfig
from shoal.data.batches import Samples
from shoal.data.shards import Split
from shoal.tasks.causal_lm import CausalLM


class Task(Protocol):
    """What a run learns, made from its configuration and the folder of prepared data."""

    best: tuple[str, Literal["min", "max"]]  # the metric that decides which checkpoint is the best, and how

    def __init__(self, config: RunConfig, folder: Path) -> None: ...

    @staticmethod
    def prepare(config: RunConfig, verbose: bool = False) -> Path:
        """Rows to samples on disk, before any worker starts; returns the folder. `verbose` says what is in it."""
        ...

    def model(self) -> nn.Module:
        """The model to train, with its weights set."""
        ...

    def check(
        self, model: Any, loss: Callable[[dict[str, Tensor]], Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Refuse a model that does not compute what it should in its place, in the precision of the run.

        Where the model is cut, `loss` is what its ranks compute together of inputs as `Samples.collate` gives them.
        """
        ...

    def samples(self, split: Split) -> Samples:
        """The samples of "train" or "eval"."""
        ...

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The sum of the losses over the labels of a collated micro-batch: a scalar in at least float32."""
        ...

    def metrics(self, loss_sum: float, labels: int) -> dict[str, float]:
        """What an evaluation over the whole "eval" split says, by metric name."""
        ...

    def example(self, model: Any) -> str | None:
        """A sample of what the trained model makes, for the eyes of a person."""
        ...

    def describe(self, model: Any, folder: Path) -> None:
        """Leave in a folder with the weights of `model` what else it takes to load them."""
        ...

    def export(self, checkpoint: Path, folder: Path, summary: dict[str, Any], model: Any | None) -> None:
        """Leave the model of a checkpoint in `folder` as others read it; `model` is the same, where it is whole."""
        ...


TASKS: dict[str, type[Task]] = {"causal-lm": CausalLM}
