"""A run put together: from its configuration to the data, the replica, the strategy and where it writes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shoal import checkpoint, optim, precision, shares
from shoal.buckets import Buckets
from shoal.checkpoint import Checkpoints, Progress
from shoal.collectives import Wire
from shoal.config import RunConfig, resolve_batch
from shoal.data.batches import Batch, Batches
from shoal.errors import UserError, choose
from shoal.evaluate import evaluate
from shoal.layouts import LAYOUTS
from shoal.mesh import Mesh
from shoal.observe.console import Screen
from shoal.replica import Loss, Replica
from shoal.sync import SYNCS, Sync
from shoal.tasks import TASKS, Task

BUILTIN_EPOCHS = 0.5


@dataclass
class Run:
    """Everything the loop needs, on one rank."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    wire: Wire
    screen: Screen
    task: Task
    batches: Batches
    replica: Replica
    sync: Sync
    checkpoints: Checkpoints
    progress: Progress
    total_steps: int

    @property
    def tensors(self) -> checkpoint.Tensors:
        """The live tensors that a checkpoint holds."""
        files = {
            "model/model.safetensors": checkpoint.model_tensors(self.replica.model),
            "optimizer/state.safetensors": dict(self.replica.optimizer_state.tensors()),
            "sync/state.safetensors": self.sync.state_dict(),
        }
        return {name: tensors for name, tensors in files.items() if tensors}

    @property
    def evaluation_due(self) -> bool:
        """Whether to validate after the steps done, before the run's end, where it is always done."""
        every = self.config.eval.eval_steps
        return bool(every) and self.progress.step % every == 0 and self.progress.step < self.total_steps

    def commit(self, batch: Batch) -> None:
        """Count a step as done."""
        failed = self.replica.nonfinite_steps > 0
        self.progress.step = batch.step + 1
        self.progress.tokens += batch.labels
        self.progress.nonfinite_steps = self.replica.nonfinite_steps
        self.progress.nonfinite_total += failed
        self.progress.shares = self.replica.shares.counts

    def save(self, *, best: bool = False) -> None:
        """Start to save a checkpoint of the steps done, unless there is one."""
        if self.mesh.is_first and (best or self.checkpoints.newest_step != self.progress.step):
            model_config = getattr(self.replica.model, "config", None)
            config_json = model_config.to_json_string() if model_config is not None else None
            self.checkpoints.save(self.tensors, self.progress, config_json, best=best)

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """The task's metrics over the whole "eval" split, {} if it is empty; None if `stop()` came true."""
        samples = self.task.samples("eval")
        if not len(samples):
            return {}
        measured = evaluate(
            self.replica.model,
            self.task.loss,  # never the compiled one: a second graph would cost more than it saves
            samples,
            micro_batch_size=self.batches.shape[1],
            wire=self.wire,
            policy=self.replica.policy,
            device=self.mesh.device,
            stop=stop,
        )
        return None if measured is None else self.task.metrics(*measured)


def assemble(config: RunConfig, mesh: Mesh, data: Path, screen: Screen) -> Run:
    """Build the run on this rank, and take up the checkpoint it resumes from.

    `data` is the folder that the task prepared. Raises UserError where the configuration, the data, the model
    or the checkpoint do not fit together.
    """
    torch.set_num_threads(config.train.threads)
    wire = Wire(mesh.group)
    _check_same_data(wire, data)
    task = choose("--task", config.train.task, TASKS)(config, data)
    policy = precision.resolve(config.train.precision, mesh.device)
    batches, total_steps, micro_batches = _batches(config, task, mesh.world_size)
    model = LAYOUTS["replicated"](task.model(), mesh, policy)
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    buckets = Buckets(
        [p for _, p in params],
        bucket_bytes=round(config.strategy.bucket_mb * 1e6),
        multiple=mesh.world_size,
        exact=config.train.exact,
    )
    replica = Replica(
        model=model,
        loss=_compiled(task.loss) if config.train.compile else task.loss,
        buckets=buckets,
        optimizers=optim.build(
            config.train.optim,
            params,
            learning_rate=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
        ),
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
        shares=_first_shares(config.strategy.balance, micro_batches, mesh.world_size),
        rank=mesh.rank,
    )
    sync = choose("--strategy", config.strategy.name, SYNCS)(config, wire)
    sync.attach(replica)
    folder = Path(config.checkpoint.output_dir)
    checkpoints = Checkpoints(
        folder, every=config.checkpoint.save_steps, keep=config.checkpoint.save_total_limit
    )
    progress = Progress(data=data.name)
    run = Run(
        config, folder, mesh, wire, screen, task, batches, replica, sync, checkpoints, progress, total_steps
    )
    if config.checkpoint.resume_from_checkpoint:
        _resume(run)
    return run


def _batches(config: RunConfig, task: Task, world_size: int) -> tuple[Batches, int, int]:
    """The batches, how many steps there are in all, and the micro-batches of a step."""
    batch = resolve_batch(config, world_size)
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


def _first_shares(balance: str, micro_batches: int, world_size: int) -> shares.Shares:
    if balance in ("auto", "off"):
        return shares.equal(micro_batches, world_size)
    return shares.fixed(balance, micro_batches, world_size)


def _resume(run: Run) -> None:
    """Go on from the checkpoint that rank 0 chooses; "latest" with none at hand starts anew."""
    asked = run.config.checkpoint.resume_from_checkpoint
    found = checkpoint.find(asked, run.folder, run.screen.say) if run.mesh.is_first else None
    chosen = run.wire.share_text(str(found or ""))
    if not chosen:
        run.screen.say(f"{run.folder} holds no checkpoint yet: starting anew")
        return
    folder = Path(chosen)
    progress = checkpoint.load_progress(folder)
    if progress.data != run.progress.data:
        raise UserError(
            f"resume from {folder}", "it was trained on other data", "give the same --data and tokenizer"
        )
    checkpoint.load_model(folder, run.replica.model)
    checkpoint.load_optimizer(folder, run.replica.optimizer_state)
    run.sync.load_state_dict(checkpoint.load_tensors(folder, "sync/state.safetensors"))
    run.progress = progress
    run.replica.nonfinite_steps = progress.nonfinite_steps
    counts = progress.shares
    if counts and len(counts) == run.mesh.world_size and sum(counts) == sum(run.replica.shares.counts):
        run.replica.shares = shares.Shares(counts)
    run.screen.say(f"resumed from {folder}: {progress.step} steps, {progress.tokens:,} tokens")
