"""A whole run from Python: what `shoal train` does, with the settings as arguments."""

import json
from pathlib import Path
from typing import Any

from shoal.config import load_config


def train(recipe: str | Path | None = None, **settings: Any) -> dict[str, Any]:
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
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
