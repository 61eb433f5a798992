"""A placed model with its data and task: what training and evaluation begin with."""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shoal import layouts
from shoal.checkpoint import Progress
from shoal.config import RunConfig, resolve_batch, resolve_grid
from shoal.data import cache
from shoal.data.batches import Batches
from shoal.errors import UserError, choose
from shoal.layouts.base import Function, PlacedModel, recompute_context
from shoal.models.on_disk import on_disk
from shoal.models.recompute import recompute
from shoal.observe.console import Screen
from shoal.optim import offload, optimizers
from shoal.tasks import TASKS, Entry, Surroundings, Task, predicts
from shoal.tensors import precision
from shoal.tensors.precision import Policy
from shoal.training.standing import checkpoint_of, load_standing
from shoal.wire.island import Island
from shoal.wire.mesh import Mesh

BUILTIN_EPOCHS = 0.5


@dataclass(frozen=True)
class BuiltModel:
    """A placed model on this rank, its task and data, and the progress of its run."""

    config: RunConfig
    mesh: Mesh
    task: Task
    surroundings: Surroundings
    policy: Policy
    placed: PlacedModel
    batches: Batches
    total_steps: int
    micro_batches: int  # of a step
    checkpoint: Path | None  # to continue from; its weights are not loaded yet
    standing: Progress


def build_model(
    config: RunConfig, mesh: Mesh, data: Path, screen: Screen, entry: Entry | None = None
) -> BuiltModel:
    """Build the model on this rank: `data` is the folder that the task prepared, `entry` the task if not `--task`.

    Raises UserError where the configuration, the data, the model or the checkpoint do not fit together.
    """
    offload.check(config.layout.offload, mesh.device)
    mesh = mesh.cut(resolve_grid(config, mesh.world_size))
    everyone = mesh.wire("world")
    entry = entry or choose("--task", config.train.task, TASKS)
    task, surroundings = entry.task(config, data), entry.surroundings(config, data)
    if mesh.size("context") > 1 and predicts(task):
        found = f"task {config.train.task} predicts of whole rows, of which each worker would have a part"
        raise UserError(f"--cp {mesh.size('context')}", found, "leave it out")
    config = optimizers.with_rate(config, trained=bool(surroundings.weights()))
    checkpoint = checkpoint_of(config, everyone, screen)
    standing = load_standing(checkpoint, config, data.name, screen) if checkpoint else Progress(position=0)
    batches, total_steps, micro_batches = _batches(config, task, mesh.teams, standing)
    policy = precision.resolve(config.train.precision, mesh.device)
    policy = replace(policy, optimizer=optimizers.state_dtype(config.train.optim, policy.optimizer))
    placed = _placed(config, mesh, task, surroundings, policy, batches.empty_micro_batch())
    return BuiltModel(
        config,
        mesh,
        task,
        surroundings,
        policy,
        placed,
        batches,
        total_steps,
        micro_batches,
        checkpoint,
        standing,
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
    """Have the task check the placed model, in the arithmetic of training."""
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


def _batches(config: RunConfig, task: Task, teams: int, standing: Progress) -> tuple[Batches, int, int]:
    """The batches from the current position on, the total number of steps, and the micro-batches of a step."""
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


def _compiled(loss: Function) -> Function:
    """Compile body, head and loss as one graph. Raises UserError if there is no C++ compiler."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "--compile", "this machine has no C++ compiler", "install g++, or leave --compile out"
        )
    return torch.compile(loss, dynamic=False)


def _epochs(config: RunConfig) -> float:
    """The epochs to train for. Of the built-in corpus, which is there for trying out, a part is enough."""
    given = config.train.num_train_epochs
    return given or (BUILTIN_EPOCHS if config.data.path == ["builtin"] else 1.0)
