"""Going on from a checkpoint, under the layout, strategy, batch and number of workers of this run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal import checkpoint
from shoal.checkpoint import Progress
from shoal.errors import UserError, described
from shoal.optim import optimizers
from shoal.replica import Replica, Shares
from shoal.sync import Sync
from shoal.training.run import Run


def resume(run: Run, folder: Path, progress: Progress) -> None:
    """Continue a run from a checkpoint whose progress is `progress`."""
    now, replica = run.progress, run.replica
    differ = run.config.strategy.traits.replicas_differ
    restore(folder, progress, now, replica, run.sync, replicas_differ=differ, say=run.screen.say)
    run.progress = replace(
        progress,
        position=run.batches.first_position,
        order=now.order,
        strategy=now.strategy,
        island_size=now.island_size,
        precision=now.precision,
        optimizer=now.optimizer,
    )
    counts = progress.shares
    if counts and len(counts) == run.mesh.teams and sum(counts) == sum(replica.shares.counts):
        replica.shares = Shares(counts)
    run.screen.say(
        f"resumed from {folder}: {progress.step} steps, {run.progress.position:,} samples, "
        f"{progress.tokens:,} tokens"
    )


def restore(
    folder: Path,
    progress: Progress,
    now: Progress,
    replica: Replica,
    sync: Sync,
    *,
    replicas_differ: bool,
    say: Callable[[str], None],
) -> None:
    """Load a checkpoint into a replica, its optimizers and a strategy, which it attaches.

    Each rank continues from its own replica where these differed, if there are as many as then.
    """
    mesh, placed = replica.mesh, replica.placed
    parts = partial(
        checkpoint.Parts, folder, first=mesh.rank - replica.island.ranks.start, every=len(replica.island)
    )
    syncs = parts("sync")
    if progress.precision not in ("", now.precision):
        say(f"{folder} was saved under --precision {progress.precision}: going on with {now.precision}")
    same_strategy = (progress.strategy, progress.island_size) == (now.strategy, now.island_size)
    same_ranks = replicas_differ and same_strategy and len(syncs) == mesh.replicate.size
    own = mesh.replicate.index if same_ranks else None
    checkpoint.load_model(folder, placed, None if own is None else parts("model")[own])
    sync.attach(replica)  # which may take copies of the model
    if optimizers.goes_on(progress.optimizer, now.optimizer):
        part = None if own is None else parts("optimizer")[own]
        checkpoint.load_optimizer(folder, replica.optimizer_state, placed, part)
    else:
        say(f"{folder} was saved under --optim {progress.optimizer}: {now.optimizer} starts anew")
    if len(syncs) and same_strategy:
        _load_sync(sync, folder, syncs)
    elif len(syncs) or progress.strategy != now.strategy:
        of = progress.strategy + (f", replicas of {progress.island_size} workers" if len(syncs) else "")
        say(f"strategy {now.strategy} starts from the model of {of}")
    replica.continue_from(progress.nonfinite_steps, progress.scaler if own is None else parts("scaler")[own])


def _load_sync(sync: Sync, folder: Path, saved: checkpoint.Parts) -> None:
    try:
        sync.load_state_dict(saved)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        found = f"the state of the strategy does not fit ({described(error)})"
        raise UserError(f"resume from {folder}", found, "use another checkpoint") from error
