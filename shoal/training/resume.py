"""Going on from a checkpoint, under the layout, strategy, batch and number of workers of this run."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal import checkpoint, shares
from shoal.checkpoint import Progress
from shoal.errors import UserError, described
from shoal.optim import optimizers
from shoal.training.run import Run


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
