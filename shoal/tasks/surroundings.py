"""What surrounds training for a kind of model: a check before it, files beside its weights, its export, a sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.config import RunConfig
from shoal.tensors.tensor_files import Stored


class Surroundings:
    """Those of a plain module: nothing is checked, and its weights are all there is of it."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def check(
        self, model: Any, loss: Callable[[dict[str, Tensor]], Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Refuse a model that does not compute what it should in its place, in the precision of the run.

        Where the model is cut, `loss` is what its ranks compute together of inputs as `Samples.collate` gives them.
        """

    def describe(self, model: Any, folder: Path) -> None:
        """Leave in a folder with the weights of `model` what else it takes to load them."""

    def export(self, checkpoint: Path, folder: Path, summary: dict[str, Any], model: Any | None) -> None:
        """Leave the model of a checkpoint in `folder` as others read it; `model` is the same, where it is whole."""
        weights = Stored(checkpoint / "model")
        folder.mkdir(parents=True)
        save_file({name: weights.read(name) for name in weights.shapes}, folder / "model.safetensors")

    def remarks(self) -> list[str]:
        """In what the model that is trained differs from the one that was named: a line each."""
        return []

    def example(self, model: Any) -> str | None:
        """A sample of what the trained model makes, for the eyes of a person."""
        return None
