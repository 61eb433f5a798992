"""Going on from a checkpoint, under the layout, strategy and number of workers of this run."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal import checkpoint, optim, shares
from shoal.errors import UserError
from shoal.run import Run


def checkpoint_of(run: Run) -> Path | None:
    """The checkpoint to go on from, which rank 0 chooses; None if "latest" was asked and there is none."""
    asked = run.config.checkpoint.resume_from_checkpoint
    found = checkpoint.find(asked, run.folder, run.screen.say) if run.mesh.is_first else None
    chosen = run.everyone.share_text(str(found or ""))
    if not chosen:
        run.screen.say(f"{run.folder} holds no checkpoint yet: starting anew")
    return Path(chosen) if chosen else None


def resume(run: Run, folder: Path) -> None:
    """Go on from a checkpoint: each rank from its own replica where these differed, if there are as many as then."""
    progress = checkpoint.load_progress(folder)
    if progress.data != run.progress.data:
        raise UserError(
            f"resume from {folder}", "it was trained on other data", "give the same --data and tokenizer"
        )
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
    same_ranks = len(syncs) == run.mesh.replicate.size and same_strategy and run.sync.replicas_differ
    own = run.mesh.replicate.index if same_ranks else None
    placed = run.replica.placed
    checkpoint.load_model(folder, placed, None if own is None else line("model")[own])
    run.sync.attach(run.replica)  # which may take copies of the model
    if optim.goes_on(progress.optimizer, now.optimizer):
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
    run.screen.say(f"resumed from {folder}: {progress.step} steps, {progress.tokens:,} tokens")


def _load_sync(run: Run, folder: Path, saved: checkpoint.Parts) -> None:
    try:
        run.sync.load_state_dict(saved)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        found = f"the state of the strategy does not fit ({' '.join(str(error).split())[:200]})"
        raise UserError(f"resume from {folder}", found, "use another checkpoint") from error
