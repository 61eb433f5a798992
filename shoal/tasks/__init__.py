"""Tasks: rows -> samples -> micro-batch -> summed loss and label count -> metrics.

A task is one file here and one line in `TASKS`. The loop, the batches and the evaluation know no task.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from shoal.config import RunConfig
from shoal.data.batches import Samples
from shoal.data.shards import Split
from shoal.tasks.causal_lm import CausalLM


class Task(Protocol):
    """What a run learns, made from its configuration and the folder of prepared data."""

    def __init__(self, config: RunConfig, folder: Path) -> None: ...

    @staticmethod
    def prepare(config: RunConfig) -> Path:
        """Rows to samples on disk, before any worker starts; returns the folder."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that made the samples; it is saved with the model."""
        ...

    def model(self) -> PreTrainedModel:
        """The model to train, with its weights set."""
        ...

    def samples(self, split: Split) -> Samples:
        """The samples of "train" or "eval"."""
        ...

    def loss(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """The sum of the losses over the labels of a collated micro-batch: a scalar in at least float32."""
        ...

    def metrics(self, loss_sum: float, labels: int) -> dict[str, float]:
        """What an evaluation over the whole "eval" split says, by metric name."""
        ...

    def example(self, model: PreTrainedModel) -> str | None:
        """A sample of what the trained model makes, for the eyes of a person."""
        ...


TASKS: dict[str, type[Task]] = {"causal-lm": CausalLM}
