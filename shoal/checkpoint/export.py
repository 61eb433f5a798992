"""`shoal export`: the Hugging Face folder of any checkpoint, made by one process without the model in memory."""

from dataclasses import dataclass
from pathlib import Path

from shoal import checkpoint
from shoal.errors import UserError, choose
from shoal.models.export import DTYPES, MAX_SHARD_SIZE, export


@dataclass(frozen=True)
class ExportOptions:
    """Which checkpoint to export, where to, and how; `source` is its folder or that of a run."""

    source: Path
    output_dir: Path
    max_shard_size: str = MAX_SHARD_SIZE
    dtype: str | None = None  # that of the checkpoint
    best: bool = False  # of a run the best checkpoint instead of the newest


def run(options: ExportOptions) -> None:
    """Export, and print what was written. Raises UserError for what cannot be done; nothing is written over then."""
    asked, target = f"shoal export {options.source}", options.output_dir
    if options.dtype is not None:
        choose("--dtype", options.dtype, DTYPES)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--output-dir {target}", "it exists", "name another, or remove it")
    folder = checkpoint.named(options.source, asked, print, best=options.best)
    if not (folder / "model" / "config.json").is_file():
        raise UserError(asked, f"{folder} holds no config.json", "export a model of transformers")
    progress = checkpoint.load_progress(folder)
    card = {"steps": progress.step, "tokens": progress.tokens, "strategy": progress.strategy}
    if progress.best is not None:
        card["lowest eval/loss"] = progress.best
    export(folder / "model", target, card, max_shard_size=options.max_shard_size, dtype=options.dtype)
    files = sorted(target.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(
        f"exported {folder} ({progress.step} steps) to {target}: {len(files)} files of weights, {size:,} bytes"
    )
