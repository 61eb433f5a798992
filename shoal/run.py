"""A run put together: from its configuration to the data, the replica, the strategy and where it writes."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shoal import checkpoint, codecs, layouts, offload, optim, precision, shares
from shoal.buckets import Buckets
from shoal.checkpoint import Checkpoints, Progress
from shoal.collectives import Wire
from shoal.config import RunConfig, resolve_batch, resolve_grid
from shoal.cost import Cost, Sizes
from shoal.data.batches import Batch, Batches
from shoal.errors import UserError, choose
from shoal.evaluate import Evaluators, evaluate
from shoal.island import Island
from shoal.layouts.base import Loss
from shoal.mesh import Mesh
from shoal.models.recompute import recompute
from shoal.models.start import on_disk
from shoal.observe.console import Screen
from shoal.piece import Piece
from shoal.precision import Policy
from shoal.replica import Replica
from shoal.rounding import RoundedAdamW
from shoal.stored import Places
from shoal.sync import SYNCS, Sync
from shoal.sync.guard import Guard
from shoal.tasks import TASKS, Task

BUILTIN_EPOCHS = 0.5
Memory = dict[str, dict[str, int | None]]  # part -> "bytes" measured, "formula"


@dataclass
class Run:
    """Everything the loop needs, on one rank."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    everyone: Wire  # all ranks
    wire: (
        Wire  # those of other replicas that hold the same pieces; the same wire where each rank is a replica
    )
    screen: Screen
    task: Task
    batches: Batches
    replica: Replica
    sync: Sync
    checkpoints: Checkpoints
    progress: Progress
    total_steps: int
    memory: Memory | None = None  # by part, once a step was watched
    shared: checkpoint.Tensors | None = None  # `tensors()` after the steps done, once they were asked for

    def tensors(self) -> checkpoint.Tensors:
        """What this rank saves of the one model: live tensors, but copies where the replicas differ."""
        if self.mesh.replicate.index:
            return {}
        names = ["model/model.safetensors", "optimizer/state.safetensors"]
        if self.is_cut:
            names = [checkpoint.rank_file(folder, self.mesh.rank) for folder in ("model", "optimizer")]
        model = checkpoint.model_tensors(self.replica.placed, buffers=self.mesh.is_first)
        files = dict(zip(names, (model, dict(self.replica.optimizer_state.tensors())), strict=True))
        if self.sync.replicas_differ:
            files = {name: {n: t.clone() for n, t in held.items()} for name, held in files.items()}
        return {name: held for name, held in files.items() if held or self.is_cut}

    @property
    def is_cut(self) -> bool:
        """Whether a replica is held by several ranks."""
        return len(self.replica.island) > 1

    @property
    def sync_cost(self) -> Cost:
        """What the strategy is expected to send and to hold, as arithmetic."""
        shapes = tuple(p.shape for _, p in self.replica.params)
        sizes = Sizes(shapes, self.mesh.replicate.size, self.replica.policy.reduction.itemsize)
        return SYNCS[self.config.strategy.name].cost(self.config, sizes)

    @property
    def bytes_sent(self) -> int:
        """By this rank so far: to other replicas, and within its own."""
        return self.wire.bytes_sent + self.replica.placed.bytes_sent()

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks, as far as the strategy hears of them."""
        return self.replica.island.agree(self.sync.agree, numbers)

    def part(self) -> dict[str, Tensor]:
        """The live tensors that only this rank holds; none where a save waits for nobody."""
        if self.sync.evaluates_alone:
            return {}
        kept = self.sync.state_dict()  # a codec's changes as soon as the next backward pass begins
        headings = {"sync": {name: tensor.clone() for name, tensor in kept.items()}}
        if self.sync.replicas_differ:
            headings["model"] = checkpoint.model_tensors(self.replica.placed)
            headings["optimizer"] = dict(self.replica.optimizer_state.tensors())
            scaler = self.replica.scaler.state_dict()
            headings["scaler"] = {name: torch.tensor(value) for name, value in scaler.items()}
        return {f"{heading}/{name}": t for heading, held in headings.items() for name, t in held.items()}

    @property
    def evaluation_due(self) -> bool:
        """Whether to validate after the steps done, before the run's end, where it is always done."""
        every = self.config.eval.eval_steps
        return bool(every) and self.progress.step % every == 0 and self.progress.step < self.total_steps

    def commit(self, batch: Batch, loss: float) -> None:
        """Count a step as done, and tell the strategy how it went."""
        self.progress.step = batch.step + 1
        self.progress.tokens += batch.labels
        self.progress.nonfinite_steps = self.replica.nonfinite_steps
        self.progress.nonfinite_total += self.replica.skipped
        self.progress.scaler = self.replica.scaler.state_dict()
        self.progress.shares = self.replica.shares.counts
        self.shared = None
        self.sync.watch(loss)

    def save(self, *, best: bool = False) -> None:
        """Start to save a checkpoint of the steps done, unless there is one. Every rank calls it."""
        if not best and self.checkpoints.newest_step == self.progress.step:
            return
        self.checkpoints.settle()
        if self.shared is None:
            with self.sync.shared_model(self.replica):
                self.shared = self.tensors()
        describe = partial(self.task.describe, self.replica.model)
        self.checkpoints.save(
            self.shared, self.progress, describe, part=self.part(), places=self._places, best=best
        )

    @property
    def _places(self) -> Places | None:
        pieces = {piece.name: piece for piece in self.replica.placed.pieces} if self.is_cut else {}
        places = {name: (tuple(piece.shape), piece.blocks) for name, piece in pieces.items()}
        for name, tensor in self.replica.optimizer_state.tensors() if pieces else ():
            piece = pieces[name.rsplit("/", 1)[0]]
            if tensor.dim() and tensor.dim() == piece.local.dim():
                places[name] = piece.place(tensor.shape)
        return places

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """The task's metrics over the whole "eval" split, {} if it is empty; None if `stop()` came true."""
        samples = self.task.samples("eval")
        alone = self.sync.evaluates_alone
        if not len(samples) or (alone and self.mesh.replicate.index):
            return {}
        self.checkpoints.settle()  # the shared model may be written over what is being copied
        island, placed = self.replica.island, self.replica.placed
        among = Evaluators(
            self.mesh.team,
            len(island.teams) if alone else self.mesh.teams,
            island.sum if alone else self.agree,
            in_step=len(island.teams),
            reports=placed.reports,
        )
        with self.sync.shared_model(self.replica):
            self.shared = self.tensors()  # for a save of the same step
            placed.refresh()
            measured = evaluate(
                self.replica.model,
                placed.loss,  # never the compiled one: a second graph would cost more than it saves
                samples,
                micro_batch_size=self.batches.shape[1],
                among=among,
                policy=self.replica.policy,
                device=self.mesh.device,
                stop=stop,
            )
            placed.release()
        return None if measured is None else self.task.metrics(*measured)


def assemble(config: RunConfig, mesh: Mesh, data: Path, screen: Screen) -> Run:
    """Build the run on this rank, and take up the checkpoint it resumes from.

    `data` is the folder that the task prepared. Raises UserError where the configuration, the data, the model
    or the checkpoint do not fit together.
    """
    offload.check(config.layout.offload, mesh.device)
    torch.set_num_threads(config.train.threads)
    mesh = mesh.cut(resolve_grid(config, mesh.world_size))
    everyone = Wire(mesh.group)
    wire = Wire(mesh.replicate.group) if mesh.size("island") > 1 else everyone
    _check_same_data(everyone, data)
    task = choose("--task", config.train.task, TASKS)(config, data)
    batches, total_steps, micro_batches = _batches(config, task, mesh.teams)
    first_shares = _first_shares(config.strategy.balance, micro_batches, mesh.teams)
    replica = _replica(config, mesh, task, total_steps, first_shares, batches.nothing())
    sync: Sync = choose("--strategy", config.strategy.name, SYNCS)(config, wire)
    if config.strategy.guard is not None:
        sync = Guard(config, wire, sync, screen.say)
    codecs.check(config.strategy, [p.shape for _, p in replica.params])
    folder = Path(config.checkpoint.output_dir)
    checkpoints = Checkpoints(
        folder,
        every=config.checkpoint.save_steps,
        keep=config.checkpoint.save_total_limit,
        rank=mesh.rank,
        world_size=mesh.world_size,
        island_size=mesh.size("island"),
        present=lambda: sync.present,
    )
    progress = Progress(
        data=data.name,
        strategy=config.strategy.remembers,
        island_size=mesh.size("island"),
        precision=replica.policy.name,
        optimizer=config.train.optim,
    )
    run = Run(
        config,
        folder,
        mesh,
        everyone,
        wire,
        screen,
        task,
        batches,
        replica,
        sync,
        checkpoints,
        progress,
        total_steps,
    )
    found = _checkpoint(run) if config.checkpoint.resume_from_checkpoint else None
    if found is None:
        sync.attach(replica)
    else:
        _resume(run, found)
    return run


def _replica(
    config: RunConfig,
    mesh: Mesh,
    task: Task,
    total_steps: int,
    first_shares: shares.Shares,
    nothing: dict[str, Tensor],
) -> Replica:
    """The task's model in its place, with its buckets and optimizers; `nothing` is a micro-batch without samples."""
    policy = precision.resolve(config.train.precision, mesh.device)
    policy = replace(policy, optimizer=optim.state_dtype(config.train.optim, policy.optimizer))
    with (
        on_disk(Path(config.data.cache_dir or "~/.cache/shoal")) if mesh.size("island") > 1 else nullcontext()
    ):
        model = task.model()
    if (
        policy.linear != policy.compute and config.eval.quantize == "none"
    ):  # weights in 8 bits take their place
        from shoal.models.float8 import use_float8  # torchao takes seconds to import

        use_float8(model, mesh.device, parts=mesh.size("tensor"))
    placed = layouts.place(model, task.loss, mesh, policy, config.layout, nothing)
    again = placed.again if mesh.size("island") > 1 else None  # which a compiler could not read
    recompute(model, config.train.gradient_checkpointing, again)
    params = [(piece.name, piece.local) for piece in placed.trained]
    buckets = Buckets(
        placed.trained,
        bucket_bytes=_bucket_bytes(config, params),
        multiple=mesh.replicate.size,
        exact=config.train.exact,
        listen=placed.one_by_one,
    )
    optimizers, updated = _optimizers(config, placed.trained, policy)
    if config.train.compile:
        placed.learnt = _compiled(placed.loss)
    return Replica(
        placed=placed,
        island=Island(mesh),
        buckets=buckets,
        optimizers=optimizers,
        updated=updated,
        policy=policy,
        device=mesh.device,
        seed=config.train.seed,
        schedule=partial(
            optim.learning_rate,
            peak=config.train.learning_rate,
            total_steps=total_steps,
            warmup_steps=config.train.warmup_steps,
            kind=config.train.lr_scheduler_type,
        ),
        max_grad_norm=config.train.max_grad_norm,
        normalize=config.strategy.normalize == "sum",
        shares=first_shares,
    )


def _optimizers(
    config: RunConfig, pieces: list[Piece], policy: Policy
) -> tuple[list[torch.optim.Optimizer], list[Piece]]:
    """The optimizers of these pieces, and what they change: the pieces, or copies on the host."""
    moved = config.layout.offload == "optimizer"
    updated = offload.on_host(pieces) if moved else pieces
    if policy.rounds_by_chance:
        optimizers = [_rounded(config, updated)]
    else:
        optimizers = optim.of(config, [(piece.name, piece.local) for piece in updated])
    if moved:
        offload.step_there(optimizers, pieces, updated)
    return optimizers, updated


def _rounded(config: RunConfig, pieces: list[Piece]) -> torch.optim.Optimizer:
    train = config.train
    return RoundedAdamW(
        pieces, seed=train.seed, learning_rate=train.learning_rate, weight_decay=train.weight_decay
    )


def _bucket_bytes(config: RunConfig, params: optim.NamedParams) -> int:
    """As asked, but small enough that each fragment of the model gets a bucket."""
    whole = sum(p.nbytes for _, p in params)
    return max(1, min(round(config.strategy.bucket_mb * 1e6), whole // config.strategy.fragments))


def _batches(config: RunConfig, task: Task, teams: int) -> tuple[Batches, int, int]:
    """The batches, how many steps there are in all, and the micro-batches of a step."""
    batch = resolve_batch(config, teams)
    samples = task.samples("train")
    by_steps = config.train.max_steps > 0
    batches = Batches(
        samples,
        seed=config.train.seed,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.per_device_train_batch_size,
        epochs=None if by_steps else _epochs(config),
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


def _compiled(loss: Loss) -> Loss:
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


def _checkpoint(run: Run) -> Path | None:
    """The checkpoint to go on from, which rank 0 chooses; None if "latest" was asked and there is none."""
    asked = run.config.checkpoint.resume_from_checkpoint
    found = checkpoint.find(asked, run.folder, run.screen.say) if run.mesh.is_first else None
    chosen = run.everyone.share_text(str(found or ""))
    if not chosen:
        run.screen.say(f"{run.folder} holds no checkpoint yet: starting anew")
    return Path(chosen) if chosen else None


def _resume(run: Run, folder: Path) -> None:
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
    models, optimizers, syncs, scalers = (
        line(heading) for heading in ("model", "optimizer", "sync", "scaler")
    )
    now = run.progress
    if progress.precision not in ("", now.precision):
        run.screen.say(
            f"{folder} was saved under --precision {progress.precision}: going on with {now.precision}"
        )
    same_strategy = (progress.strategy, progress.island_size) == (now.strategy, now.island_size)
    same_ranks = len(models) == run.mesh.replicate.size and same_strategy and run.sync.replicas_differ
    own = run.mesh.replicate.index if same_ranks else None
    placed = run.replica.placed
    checkpoint.load_model(folder, placed, None if own is None else models[own])
    run.sync.attach(run.replica)  # which may take copies of the model
    if optim.goes_on(progress.optimizer, now.optimizer):
        part = None if own is None else optimizers[own]
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
    run.replica.scaler.load_state_dict(progress.scaler if own is None else scalers[own])
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
