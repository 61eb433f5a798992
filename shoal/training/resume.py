"""Going on from a checkpoint, under the layout, strategy, batch and number of workers of this run."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal import checkpoint, shares
from shoal.checkpoint import Progress
from shoal.config import RunConfig, first_change, load_config, order_of, resolve_batch, team_size
from shoal.errors import UserError, described
from shoal.observe.console import Screen
from shoal.optim import optimizers
from shoal.system.run_folder import CONFIG, ENVIRONMENT
from shoal.training.run import Run
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
    """Where a checkpoint stands, `data` being the key of what this run learns from.

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
    """What the folder of a run says of its last start: the configuration, and how many workers there were."""
    with suppress(UserError, OSError, ValueError, KeyError, TypeError):
        config = load_config(folder.parent / CONFIG, environ={}).config
        workers = json.loads((folder.parent / ENVIRONMENT).read_text())["workers"]
        resolve_batch(config, workers // team_size(config))
        return config, workers
    return None


def resume(run: Run, folder: Path, progress: Progress) -> None:
    """Go on from a checkpoint: each rank from its own replica where these differed, if there are as many as then."""
    line = partial(
        checkpoint.Parts,
        folder,
        first=run.mesh.rank - run.replica.island.ranks.start,
        every=len(run.replica.island),
    )
    syncs = line("sync")
    now = run.progress
    if progress.precision not in ("", now.precision):
        run.screen.say(
            f"{folder} was saved under --precision {progress.precision}: going on with {now.precision}"
        )
    same_strategy = (progress.strategy, progress.island_size) == (now.strategy, now.island_size)
    same_ranks = (
        len(syncs) == run.mesh.replicate.size and same_strategy and run.config.strategy.traits.replicas_differ
    )
    own = run.mesh.replicate.index if same_ranks else None
    placed = run.replica.placed
    checkpoint.load_model(folder, placed, None if own is None else line("model")[own])
    run.sync.attach(run.replica)  # which may take copies of the model
    if optimizers.goes_on(progress.optimizer, now.optimizer):
        part = None if own is None else line("optimizer")[own]
        checkpoint.load_optimizer(folder, run.replica.optimizer_state, placed, part)
    else:
        run.screen.say(f"{folder} was saved under --optim {progress.optimizer}: {now.optimizer} starts anew")
    if len(syncs) and same_strategy:
        _load_sync(run, folder, syncs)
    elif len(syncs) or progress.strategy != now.strategy:
        of = progress.strategy + (f", replicas of {progress.island_size} workers" if len(syncs) else "")
        run.screen.say(f"strategy {now.strategy} starts from the model of {of}")
    run.progress = replace(
        progress,
        position=run.batches.first_position,
        order=now.order,
        strategy=now.strategy,
        island_size=now.island_size,
        precision=now.precision,
        optimizer=now.optimizer,
    )
    run.replica.nonfinite_steps = progress.nonfinite_steps
    run.replica.scaler.load_state_dict(progress.scaler if own is None else line("scaler")[own])
    counts = progress.shares
    if counts and len(counts) == run.mesh.teams and sum(counts) == sum(run.replica.shares.counts):
        run.replica.shares = shares.Shares(counts)
    run.screen.say(
        f"resumed from {folder}: {progress.step} steps, {run.progress.position:,} samples, "
        f"{progress.tokens:,} tokens"
    )


def _load_sync(run: Run, folder: Path, saved: checkpoint.Parts) -> None:
    try:
        run.sync.load_state_dict(saved)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        found = f"the state of the strategy does not fit ({described(error)})"
        raise UserError(f"resume from {folder}", found, "use another checkpoint") from error
