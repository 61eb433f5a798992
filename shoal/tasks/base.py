"""What a task provides: samples, a model, a loss, and what an evaluation measures and predicts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from shoal.config import RunConfig
from shoal.data.batches import Samples
from shoal.data.shards import Split


class Task(ABC):
    """What a run learns, made from its configuration and the folder of prepared data.

    `loss`, `measure` and `predict` are functions of a model and a collated micro-batch, which layouts call on models
    that are cut as well. Most tasks override `model`, `samples`, `loss` and `metrics`.
    """

    # The metric by which a checkpoint is the best one, and its direction.
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("eval/loss", "min")

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    @abstractmethod
    def model(self) -> nn.Module:
        """The model to train, with its weights set."""

    @abstractmethod
    def samples(self, split: Split) -> Samples:
        """The samples of "train" or "eval"."""

    @abstractmethod
    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The sum of the losses over the labels of a collated micro-batch: a scalar in at least float32."""

    def measure(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The sums [k] over a micro-batch that `metrics` needs, in float64. The default is the sum of the loss."""
        return self.loss(model, inputs).detach().double().view(1)

    def predict(self, model: Any, inputs: dict[str, Tensor]) -> Sequence[Any] | None:
        """A JSON value for each row of a micro-batch, absent rows too. None: the task predicts nothing."""
        return None

    def metrics(self, sums: Sequence[float], labels: int, predictions: Sequence[Any]) -> dict[str, float]:
        """The metrics of an evaluation by name, from the sums over all micro-batches and the predictions in order."""
        return {"eval/loss": sums[0] / max(1, labels), "eval/tokens": labels}


def predicts(task: Task) -> bool:
    """Whether a task predicts anything."""
    return type(task).predict is not Task.predict
