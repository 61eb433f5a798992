"""Assembles a run from its configuration: data, replica, strategy, and the folder it writes to."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from shoal import codecs, shares
from shoal.checkpoint import Checkpoints, Progress
from shoal.config import RunConfig, order_of
from shoal.errors import choose
from shoal.layouts.base import PlacedModel, bytes_held
from shoal.observe.console import Screen
from shoal.observe.memory import COPIES, MemoryReport
from shoal.optim import offload
from shoal.optim import optimizers as optimizing
from shoal.optim.rounding import RoundedAdamW
from shoal.replica import Replica
from shoal.sync import SYNCS, Sync, cost_of
from shoal.sync.guard import Guard
from shoal.tasks import Entry
from shoal.tensors.buckets import Buckets
from shoal.tensors.piece import Piece, named, trained
from shoal.tensors.precision import Policy
from shoal.training.balance import Balancer
from shoal.training.model import BuiltModel, build_model
from shoal.training.resume import resume
from shoal.training.run import Run
from shoal.training.saving import Saver
from shoal.wire.mesh import Mesh


def assemble(config: RunConfig, mesh: Mesh, data: Path, screen: Screen, entry: Entry | None = None) -> Run:
    """Build the model and the training around it on this rank, and take up the checkpoint it resumes from.

    `data` is the folder that the task prepared, `entry` the task if it is not `--task`. Raises UserError where the
    configuration, the data, the model or the checkpoint do not fit together.
    """
    return build_training(build_model(config, mesh, data, screen, entry), data.name, screen)


def build_training(built: BuiltModel, data: str, screen: Screen) -> Run:
    """Build the training around a model, and take up its checkpoint; `data` is the key of the prepared data."""
    config, mesh, total_steps = built.config, built.mesh, built.total_steps
    replica = _replica(built)
    sync, watch, all_agree = build_sync(config, replica, screen.say)
    balancer = Balancer(off=config.strategy.balance != "auto" or not all_agree)
    folder = Path(config.checkpoint.output_dir)
    checkpoints = Checkpoints(
        folder,
        every=config.checkpoint.save_steps,
        keep=config.checkpoint.save_total_limit,
        rank=mesh.rank,
        world_size=mesh.world_size,
        island_size=mesh.size("island"),
        present=lambda: sync.members.present,
    )
    progress = Progress(
        position=0,
        data=data,
        order=order_of(config),
        strategy=config.strategy.remembers,
        island_size=mesh.size("island"),
        precision=replica.policy.name,
        optimizer=config.train.optim,
    )
    run = Run(
        built,
        folder,
        screen,
        replica,
        sync,
        Saver(checkpoints, replica, sync, built.surroundings, config.strategy.traits.replicas_differ),
        balancer,
        MemoryReport(
            replica,
            sync,
            lambda: _predicted_memory(config, replica),
            last_step=total_steps - 1,
            wanted=config.log.memory_report,
        ),
        progress,
        watch,
    )
    if built.checkpoint is None:
        sync.attach(replica)
    else:
        resume(run, built.checkpoint, built.standing)
    return run


def build_sync(
    config: RunConfig, replica: Replica, say: Callable[[str], None]
) -> tuple[Sync, Callable[[float], None], bool]:
    """Make the strategy, not attached yet.

    Returns it, the function to call with the loss of each step, and whether that loss is the same on all ranks.

    Raises UserError where the settings do not fit the model.
    """
    wire = replica.mesh.wire("replicate")
    codecs.check(config.strategy, [p.shape for _, p in replica.params])
    sync: Sync = choose("--strategy", config.strategy.name, SYNCS)(config, wire)
    all_agree = sync.members.all_agree
    if config.strategy.guard is None:
        return sync, lambda loss: None, all_agree
    guard = Guard(config, wire, sync, say)
    return guard, guard.watch, all_agree


def _predicted_memory(config: RunConfig, replica: Replica) -> dict[str, int]:
    """The bytes that each part should hold, by arithmetic."""
    return bytes_held(replica.placed) | {
        "gradients": sum(bucket.flat.nbytes for bucket in replica.buckets),
        "optimizer state": optimizing.state_bytes(replica.optimizers),
        "sync and codec": cost_of(config, replica).held,
        COPIES: 2 * sum(p.nbytes for _, p in replica.params),
    }


def _replica(built: BuiltModel) -> Replica:
    """The model with its buckets and optimizers."""
    config, mesh, policy = built.config, built.mesh, built.policy
    assert config.train.learning_rate is not None
    schedule = partial(
        optimizing.learning_rate,
        peak=config.train.learning_rate,
        total_steps=built.total_steps,
        warmup_steps=config.train.warmup_steps,
        kind=config.train.lr_scheduler_type,
        lowest=config.train.min_lr,
    )
    optimizers, updated = _optimizers(config, trained(built.placed.pieces), policy)
    first = _first_shares(config.strategy.balance, built.micro_batches, mesh.teams)
    return build_replica(config, mesh, policy, built.placed, optimizers, updated, schedule, first)


def build_replica(
    config: RunConfig,
    mesh: Mesh,
    policy: Policy,
    placed: PlacedModel,
    optimizers: list[torch.optim.Optimizer],
    updated: list[Piece],
    schedule: Callable[[int], float],
    first_shares: shares.Shares,
) -> Replica:
    """A placed model with its gradients in buckets; `optimizers` update the pieces `updated`."""
    pieces = trained(placed.pieces)
    buckets = Buckets(
        pieces,
        bucket_bytes=_bucket_bytes(config, named(pieces)),
        multiple=mesh.replicate.size,
        exact=config.train.exact,
        listen=placed.singly,
    )
    return Replica(
        placed=placed,
        mesh=mesh,
        buckets=buckets,
        optimizers=optimizers,
        updated=updated,
        policy=policy,
        seed=config.train.seed,
        schedule=schedule,
        max_grad_norm=config.train.max_grad_norm,
        normalize=config.strategy.normalize == "sum",
        shares=first_shares,
    )


def _optimizers(
    config: RunConfig, pieces: list[Piece], policy: Policy
) -> tuple[list[torch.optim.Optimizer], list[Piece]]:
    """The optimizers of these pieces, and the tensors they update: the pieces, or copies on the host."""
    moved = config.layout.offload == "optimizer"
    updated = offload.on_host(pieces) if moved else pieces
    options = optimizing.of_config(config)
    optimizers: list[torch.optim.Optimizer]
    if policy.rounds_by_chance:
        optimizers = [RoundedAdamW(updated, options, seed=config.train.seed)]
    else:
        optimizers = optimizing.build(config.train.optim, named(updated), options)
    if moved:
        offload.step_there(optimizers, pieces, updated)
    return optimizers, updated


def _bucket_bytes(config: RunConfig, params: optimizing.NamedParams) -> int:
    """As asked, but small enough that each fragment of the model gets a bucket."""
    whole = sum(p.nbytes for _, p in params)
    return max(1, min(round(config.strategy.bucket_mb * 1e6), whole // config.strategy.fragments))


def _first_shares(balance: str, micro_batches: int, teams: int) -> shares.Shares:
    if balance in ("auto", "off"):
        return shares.equal(micro_batches, teams)
    return shares.fixed(balance, micro_batches, teams)
