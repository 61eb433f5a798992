"""A run put together: from its configuration to the data, the replica, the strategy and where it writes."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shoal import codecs, layouts, shares
from shoal.checkpoint import Checkpoints, Progress
from shoal.config import RunConfig, order_of, resolve_batch, resolve_grid
from shoal.data import cache
from shoal.data.batches import Batches
from shoal.errors import UserError, choose
from shoal.layouts.base import Function, PlacedModel, bytes_held, recompute_context
from shoal.models.on_disk import on_disk
from shoal.models.recompute import recompute
from shoal.observe.console import Screen
from shoal.observe.memory import COPIES, MemoryReport
from shoal.optim import offload
from shoal.optim import optimizers as optimizing
from shoal.optim.rounding import RoundedAdamW
from shoal.replica import Replica
from shoal.sync import SYNCS, Sync, cost_of
from shoal.sync.guard import Guard
from shoal.tasks import TASKS, Surroundings, Task, predicts
from shoal.tensors import precision
from shoal.tensors.buckets import Buckets
from shoal.tensors.piece import Piece, named, trained
from shoal.tensors.precision import Policy
from shoal.training.balance import Balancer
from shoal.training.resume import checkpoint_of, load_standing, resume
from shoal.training.run import Run
from shoal.training.saving import Saver
from shoal.wire.island import Island
from shoal.wire.mesh import Mesh
from shoal.wire.wire import Wire

BUILTIN_EPOCHS = 0.5


def assemble(config: RunConfig, mesh: Mesh, data: Path, screen: Screen) -> Run:
    """Build the run on this rank, and take up the checkpoint it resumes from.

    `data` is the folder that the task prepared. Raises UserError where the configuration, the data, the model
    or the checkpoint do not fit together.
    """
    offload.check(config.layout.offload, mesh.device)
    mesh = mesh.cut(resolve_grid(config, mesh.world_size))
    everyone, wire = mesh.wire("world"), mesh.wire("replicate")
    _check_same_data(everyone, data)
    entry = choose("--task", config.train.task, TASKS)
    task, surroundings = entry.task(config, data), entry.surroundings(config, data)
    if mesh.size("context") > 1 and predicts(task):
        found_in = f"task {config.train.task} predicts of whole rows, of which each worker would have a part"
        raise UserError(f"--cp {mesh.size('context')}", found_in, "leave it out")
    found = checkpoint_of(config, everyone, screen)
    standing = load_standing(found, config, data.name, screen) if found else Progress(position=0)
    batches, total_steps, micro_batches = _batches(config, task, mesh.teams, standing)
    first_shares = _first_shares(config.strategy.balance, micro_batches, mesh.teams)
    replica = _replica(
        config, mesh, task, surroundings, total_steps, first_shares, batches.empty_micro_batch()
    )
    sync: Sync = choose("--strategy", config.strategy.name, SYNCS)(config, wire)
    balancer = Balancer(off=config.strategy.balance != "auto" or not sync.members.all_agree)
    watch: Callable[[float], None] = lambda loss: None  # noqa: E731
    if config.strategy.guard is not None:
        sync = guard = Guard(config, wire, sync, screen.say)
        watch = guard.watch
    codecs.check(config.strategy, [p.shape for _, p in replica.params])
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
        data=data.name,
        order=order_of(config),
        strategy=config.strategy.remembers,
        island_size=mesh.size("island"),
        precision=replica.policy.name,
        optimizer=config.train.optim,
    )
    run = Run(
        config,
        folder,
        mesh,
        screen,
        task,
        surroundings,
        batches,
        replica,
        sync,
        Saver(checkpoints, replica, sync, surroundings, config.strategy.traits.replicas_differ),
        balancer,
        MemoryReport(
            replica,
            sync,
            lambda: _predicted_memory(config, replica),
            last_step=total_steps - 1,
            wanted=config.log.memory_report,
        ),
        progress,
        total_steps,
        watch,
    )
    if found is None:
        sync.attach(replica)
    else:
        resume(run, found, standing)
    return run


def _predicted_memory(config: RunConfig, replica: Replica) -> dict[str, int]:
    """The bytes of parts of the memory, as arithmetic."""
    return bytes_held(replica.placed) | {
        "gradients": sum(bucket.flat.nbytes for bucket in replica.buckets),
        "optimizer state": optimizing.state_bytes(replica.optimizers),
        "sync and codec": cost_of(config, replica).held,
        COPIES: 2 * sum(p.nbytes for _, p in replica.params),
    }


def _replica(
    config: RunConfig,
    mesh: Mesh,
    task: Task,
    surroundings: Surroundings,
    total_steps: int,
    first_shares: shares.Shares,
    empty_micro_batch: dict[str, Tensor],
) -> Replica:
    """The task's model in its place, with its buckets and optimizers."""
    policy = precision.resolve(config.train.precision, mesh.device)
    policy = replace(policy, optimizer=optimizing.state_dtype(config.train.optim, policy.optimizer))
    placed = _placed(config, mesh, task, surroundings, policy, empty_micro_batch)
    pieces = trained(placed.pieces)
    params = named(pieces)
    buckets = Buckets(
        pieces,
        bucket_bytes=_bucket_bytes(config, params),
        multiple=mesh.replicate.size,
        exact=config.train.exact,
        listen=placed.singly,
    )
    optimizers, updated = _optimizers(config, pieces, policy)
    return Replica(
        placed=placed,
        mesh=mesh,
        buckets=buckets,
        optimizers=optimizers,
        updated=updated,
        policy=policy,
        seed=config.train.seed,
        schedule=partial(
            optimizing.learning_rate,
            peak=config.train.learning_rate,
            total_steps=total_steps,
            warmup_steps=config.train.warmup_steps,
            kind=config.train.lr_scheduler_type,
        ),
        max_grad_norm=config.train.max_grad_norm,
        normalize=config.strategy.normalize == "sum",
        shares=first_shares,
    )


def _placed(
    config: RunConfig,
    mesh: Mesh,
    task: Task,
    surroundings: Surroundings,
    policy: Policy,
    empty_micro_batch: dict[str, Tensor],
) -> PlacedModel:
    cut = mesh.size("island") > 1
    with on_disk(cache.folder_of(config.data.cache_dir)) if cut else nullcontext():
        model = task.model()
    # Weights in 8 bits, which `shoal evaluate --quantize` holds, take the place of products in 8 bits.
    if policy.linear != policy.compute and config.eval.quantize == "none":
        from shoal.models.float8 import use_float8  # torchao takes seconds to import

        use_float8(model, mesh.device, parts=mesh.size("tensor"))
    loss = _compiled(task.loss) if config.train.compile else task.loss
    placed = layouts.place(model, loss, mesh, policy, config.layout, empty_micro_batch)
    # A compiler, which takes whole replicas alone, could not read what is asked.
    recompute(model, config.train.gradient_checkpointing, recompute_context(placed) if cut else None)
    _check_model(task, surroundings, placed, mesh, policy)
    return placed


def _check_model(
    task: Task, surroundings: Surroundings, placed: PlacedModel, mesh: Mesh, policy: Policy
) -> None:
    """Have the task check the model in its place, in the arithmetic of training."""
    island = Island(mesh)
    cut = len(island) > 1

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        placed.before_forward()
        moved = {name: tensor.to(mesh.device) for name, tensor in inputs.items()}
        found = placed.call(task.loss, moved)
        placed.after_evaluation()
        return island.sum(torch.zeros((), dtype=torch.float64) if found is None else found.double().cpu())

    was_training = placed.model.training
    placed.model.eval()
    with torch.no_grad(), policy.autocast(mesh.device):
        surroundings.check(placed.model, loss if cut else None, policy.linear)
    placed.model.train(was_training)


def _optimizers(
    config: RunConfig, pieces: list[Piece], policy: Policy
) -> tuple[list[torch.optim.Optimizer], list[Piece]]:
    """The optimizers of these pieces, and what they change: the pieces, or copies on the host."""
    moved = config.layout.offload == "optimizer"
    updated = offload.on_host(pieces) if moved else pieces
    rounds = policy.rounds_by_chance
    optimizers = [_rounded(config, updated)] if rounds else optimizing.of(config, named(updated))
    if moved:
        offload.step_there(optimizers, pieces, updated)
    return optimizers, updated


def _rounded(config: RunConfig, pieces: list[Piece]) -> torch.optim.Optimizer:
    train = config.train
    return RoundedAdamW(
        pieces, seed=train.seed, learning_rate=train.learning_rate, weight_decay=train.weight_decay
    )


def _bucket_bytes(config: RunConfig, params: optimizing.NamedParams) -> int:
    """As asked, but small enough that each fragment of the model gets a bucket."""
    whole = sum(p.nbytes for _, p in params)
    return max(1, min(round(config.strategy.bucket_mb * 1e6), whole // config.strategy.fragments))


def _batches(config: RunConfig, task: Task, teams: int, standing: Progress) -> tuple[Batches, int, int]:
    """The batches from where the run stands, how many steps there are in all, and the micro-batches of a step."""
    batch = resolve_batch(config, teams)
    samples = task.samples("train")
    by_steps = config.train.max_steps > 0
    position = standing.position
    if position is None:  # of an earlier version, and nothing says its batch
        position = standing.step * batch.global_batch_size
    batches = Batches(
        samples,
        seed=config.train.seed,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.per_device_train_batch_size,
        epochs=None if by_steps else _epochs(config),
        at=(standing.step, position),
    )
    return batches, config.train.max_steps or batches.steps or 0, batch.micro_batches


def _check_same_data(wire: Wire, data: Path) -> None:
    """The folder's name is the hash of what is in it."""
    first = wire.share_text(data.name)
    if data.name != first:
        found = f"rank {wire.rank} prepared {data.name}, rank 0 {first}"
        raise UserError(
            "--data", found, "give every machine the same files (and the same Python for builtin)"
        )


def _compiled(loss: Function) -> Function:
    """The whole of body, head and loss as one graph. Raises UserError where there is nothing to compile it with."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "--compile", "this machine has no C++ compiler", "install g++, or leave --compile out"
        )
    return torch.compile(loss, dynamic=False)


def _epochs(config: RunConfig) -> float:
    """The built-in corpus is there to see it work: a part of it is enough."""
    given = config.train.num_train_epochs
    return given or (BUILTIN_EPOCHS if config.data.path == ["builtin"] else 1.0)


def _first_shares(balance: str, micro_batches: int, teams: int) -> shares.Shares:
    if balance in ("auto", "off"):
        return shares.equal(micro_batches, teams)
    return shares.fixed(balance, micro_batches, teams)
