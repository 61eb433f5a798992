"""The model of a folder: that of a run, of a checkpoint, or the folder itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig, Resolved, load_config
from shoal.config.presets import PRESETS
from shoal.errors import UserError
from shoal.system import manifest
from shoal.system.run_folder import CONFIG


def model_folder(folder: Path) -> Path:
    """The final model of a run, the verified model of a checkpoint, or any other folder itself.

    Raises UserError where a run has not ended, or a checkpoint is damaged or in pieces.
    """
    if (folder / "final").is_dir():
        return folder / "final"
    if any((folder / name).is_file() for name in ("config.resolved.yaml", "metrics.jsonl")):
        raise UserError(
            str(folder), "this run has no final/ model yet", "let it end, or name one of its checkpoints"
        )
    if not is_checkpoint(folder):
        return folder
    if problem := manifest.verify(folder):
        raise UserError(str(folder), problem, "use another checkpoint")
    if not (folder / "model" / "model.safetensors").is_file():
        raise UserError(
            str(folder), "its model is in pieces", f"put it together: shoal export {folder} --output-dir ..."
        )
    return folder / "model"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a checkpoint."""
    return (folder / manifest.NAME).is_file()


def settings_of(folder: Path, flags: Sequence[str] = (), **settings: Any) -> Resolved:
    """The settings to evaluate the model of a folder under: a run's or a checkpoint's own, changed by those given.

    Of any other model's folder the defaults. Raises UserError where there is no model.
    """
    if not folder.is_dir():
        raise UserError(f"evaluate {folder}", "there is no such folder", "give a run's or a model's folder")
    model, given = str(model_folder(folder)), list(flags)
    recipe = (folder.parent if is_checkpoint(folder) else folder) / CONFIG
    if not recipe.exists():
        return load_config(None, given, **{"model": model} | settings)
    trained, asked = load_config(recipe).config, load_config(recipe, given, **settings)
    data = asked.config.data
    if data.tokenizer == "auto":
        # Trained again from the same text it has the same key, and what was prepared is found.
        found_again = data == trained.data and trained.model.name in PRESETS
        data = data.model_copy(update={"tokenizer": "train" if found_again else model})
    fresh = asked.config.checkpoint.model_copy(update={"resume_from_checkpoint": ""})
    layout = asked.config.layout.model_copy(update={"offload": "none"})  # nothing is trained
    sections = {"model": ModelConfig(name=model), "data": data, "checkpoint": fresh, "layout": layout}
    return Resolved(asked.config.model_copy(update=sections), asked.origins)
