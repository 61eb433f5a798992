"""Which model a folder stands for: a run's, a checkpoint's, or one of its own."""

from pathlib import Path

from shoal.errors import UserError
from shoal.system import manifest


def model_folder(folder: Path) -> Path:
    """Of a run the model it ended in, of a checkpoint the one in it, once verified; any other folder itself.

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
    """Whether it claims to be one."""
    return (folder / manifest.NAME).is_file()
