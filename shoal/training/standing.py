"""Finds the checkpoint that a run continues from, and refuses one that would continue with other samples."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shoal import checkpoint
from shoal.checkpoint import Progress
from shoal.config import RunConfig, first_change, load_config, order_of, resolve_batch, team_size
from shoal.errors import UserError
from shoal.observe.console import Screen
from shoal.system.run_folder import CONFIG, ENVIRONMENT
from shoal.wire.wire import Wire


def checkpoint_of(config: RunConfig, everyone: Wire, screen: Screen) -> Path | None:
    """The checkpoint to go on from, which rank 0 chooses; None if none was asked for, or there is no "latest"."""
    asked, folder = config.checkpoint.resume_from_checkpoint, Path(config.checkpoint.output_dir)
    if not asked:
        return None
    found = checkpoint.find(asked, folder, screen.say) if everyone.rank == 0 else None
    chosen = everyone.share_text(str(found or ""))
    if not chosen:
        screen.say(f"{folder} holds no checkpoint yet: starting anew")
    return Path(chosen) if chosen else None


def load_standing(folder: Path, config: RunConfig, data: str, screen: Screen) -> Progress:
    """The progress of a checkpoint; `data` is the key of this run's data.

    Raises UserError where the samples, or their order, would not be those of the run that it is of.
    """
    progress, asked = checkpoint.load_progress(folder), f"resume from {folder}"
    if progress.data != data:
        same = "give the same --data, tokenizer, --text-field, --eval-path and --eval-fraction"
        raise UserError(asked, "it was trained on other data", same)
    past = None if progress.position is not None and progress.order else _recorded(folder)
    order = progress.order or (order_of(past[0]) if past else {})
    if order and (change := first_change(order, config)):
        flag, then, now = change
        raise UserError(
            asked,
            f"it was trained with {flag} {then}, and {flag} {now} would take other samples, or in another order",
            f"keep {flag} {then}, or begin a new run from the weights with --model {folder}/model",
        )
    if progress.position is None and past:
        batch = resolve_batch(past[0], past[1] // team_size(past[0])).global_batch_size
        return replace(progress, position=progress.step * batch)
    if progress.position is None:
        screen.say(
            f"{folder} does not say which samples it has used: this run assumes its own batch size and seed"
        )
    return progress


def _recorded(folder: Path) -> tuple[RunConfig, int] | None:
    """The configuration and number of workers of the last start, from the run's folder."""
    with suppress(UserError, OSError, ValueError, KeyError, TypeError):
        config = load_config(folder.parent / CONFIG, environ={}).config
        workers = json.loads((folder.parent / ENVIRONMENT).read_text())["workers"]
        resolve_batch(config, workers // team_size(config))
        return config, workers
    return None
