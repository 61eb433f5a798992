"""What is done around training for a kind of model: check it, save files beside its weights, export it, sample it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.config import RunConfig
from shoal.tensors.tensor_files import Stored


class Surroundings:
    """For a plain module: no check, and the weights are all that is saved and exported."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def check(
        self, model: Any, loss: Callable[[dict[str, Tensor]], Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Refuse a model that computes something else once it is placed, in the precision of the run.

        `loss` is given where the model is cut: it computes the loss of a collated micro-batch on all ranks together.
        """

    def describe(self, model: Any, folder: Path) -> None:
        """Write what else is needed to load `model` into a folder that holds its weights."""

    def export(self, checkpoint: Path, folder: Path, summary: dict[str, Any], model: Any | None) -> None:
        """Write the model of a checkpoint to `folder` in the format that others read.

        `model` is the same model in memory, if this rank holds all of it.
        """
        weights = Stored(checkpoint / "model")
        folder.mkdir(parents=True)
        save_file({name: weights.read(name) for name in weights.shapes}, folder / "model.safetensors")

    def weights(self) -> str:
        """Where the model's weights come from, as the banner says it; empty: they are drawn at random."""
        return ""

    def remarks(self) -> list[str]:
        """How the model that is trained differs from the one that was named: one line for each difference."""
        return []

    def example(self, model: Any) -> str | None:
        """A sample of the trained model's output to show to the user."""
        return None
