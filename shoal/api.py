"""The verbs of the command line from Python, with the settings as arguments."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.config import load_config
from shoal.system.run_folder import SUMMARY


class Summary(dict[str, Any]):
    """What a run ended in: its numbers by name (`summary["eval/loss"]`), some of them by attribute."""

    def __init__(self, numbers: Mapping[str, Any], folder: Path) -> None:
        super().__init__(numbers)
        self.folder = folder  # of the run

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of the evaluation, by name without `eval/`."""
        return {n.removeprefix("eval/"): v for n, v in self.items() if n.startswith("eval/")}

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self["steps"])

    @property
    def tokens(self) -> int:
        """Labels that the run has learnt from."""
        return int(self["tokens"])

    @property
    def seconds(self) -> float:
        """Spent in steps, all attempts together."""
        return float(self["seconds"])


def train(recipe: str | Path | None = None, **settings: Any) -> Summary:
    """Train a model and return the run's summary (what summary.json in its folder says).

    `settings` go by the names of the flags: `train("recipe.yaml", model="gpt2", max_steps=100)`. Raises
    UserError for bad input, Preempted where the run was asked to stop, and ShoalError, with the reason, where it
    fails otherwise. Workers are processes, and so a script that calls this needs
    `if __name__ == "__main__":`.
    """
    resolved = load_config(Path(recipe) if recipe else None, **settings)
    from shoal.engines.local import launch

    launch(resolved)
    folder = Path(resolved.config.checkpoint.output_dir)
    return Summary(json.loads((folder / SUMMARY).read_text(encoding="utf-8")), folder)


def evaluate(folder: str | Path, **settings: Any) -> dict[str, float]:
    """The metrics of a run, a checkpoint or a model on held-out data, by name (`eval/loss`).

    `settings` go by the names of the flags, and change the run's own: `evaluate("runs/mine", eval_path="new.txt")`.
    Raises as `train` does. Under an engine such as torchrun rank 0 gets the metrics, and the others none.
    """
    from shoal.checkpoint.model_folder import settings_of
    from shoal.engines.local import launch

    return launch(settings_of(Path(folder), **settings), "evaluate") or {}


def generate(folder: str | Path, prompt: str, **options: Any) -> str:
    """What the model of a run, a checkpoint or a folder writes on from `prompt`, in this process.

    `options` are the flags of `shoal generate`: `max_new_tokens=64, temperature=0.8, seed=1`. Raises UserError for
    what is no model's folder, and for options that do not fit.
    """
    from shoal.serve.generate import GenerateOptions, complete

    return complete(GenerateOptions(model=str(folder), prompt=prompt, **options))
