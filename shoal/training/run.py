"""A run: all that the loop needs on one rank, and what it saves and measures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shoal import checkpoint
from shoal.checkpoint import Checkpoints, Progress
from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.data.batches import Batch, Batches
from shoal.observe.console import Screen
from shoal.replica import Replica, Step
from shoal.sync import SYNCS, Sync
from shoal.sync.guard import Guard
from shoal.tasks import Task
from shoal.tensors.tensor_files import Places
from shoal.training.balance import Balancer
from shoal.training.evaluate import Evaluators, evaluate
from shoal.wire.mesh import Mesh

Memory = dict[str, dict[str, int | None]]  # part -> "bytes" measured, "formula"


@dataclass
class Run:
    """Everything the loop needs, on one rank."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    screen: Screen
    task: Task
    batches: Batches
    replica: Replica
    sync: Sync
    checkpoints: Checkpoints
    progress: Progress
    total_steps: int
    balancer: Balancer = field(default_factory=Balancer)
    memory: Memory | None = None  # by part, once a step was watched
    saving: bool = False  # whether parameters may still be read for a save, here or on rank 0
    shared: checkpoint.Tensors | None = None  # `tensors()` after the steps done, once they were asked for

    def __post_init__(self) -> None:
        self._sent_before = self.mesh.bytes_sent  # to start the run

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
        """By this rank in training so far: to other replicas, and within its own."""
        return self.mesh.bytes_sent - self._sent_before

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks, as far as the strategy hears of them."""
        return self.replica.island.agree(self.sync.members.agree, numbers)

    def part(self) -> dict[str, Tensor]:
        """The live tensors that only this rank holds; none where a save waits for nobody."""
        if self.sync.members.evaluates_alone:
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

    def commit(self, batch: Batch, step: Step, loss: float) -> None:
        """Count a step as done, and tell the strategy how it went."""
        self.progress.step = batch.step + 1
        self.progress.position = batch.next_position
        self.progress.tokens += batch.labels
        self.progress.nonfinite_steps = self.replica.nonfinite_steps
        self.progress.nonfinite_total += step.skipped
        self.progress.scaler = self.replica.scaler.state_dict()
        self.progress.shares = self.replica.shares.counts
        self.shared = None
        if isinstance(self.sync, Guard):
            self.sync.watch(loss)

    def balance(self, seconds: list[float]) -> None:
        """Give faster teams more micro-batches, if that is wanted, and if all ranks know the same `seconds`."""
        if self.config.strategy.balance == "auto" and self.sync.members.all_agree:
            self.replica.shares = self.balancer.observe(self.replica.shares, seconds)

    def leave(self) -> None:
        """Part from the others, once no save reads the parameters: a strategy may have to bring the final ones.

        Where ranks do not wait for each other, what the foremost has done counts as done.
        """
        self.settle()
        self.sync.members.finish(self.replica)
        reached = min(self.total_steps, self.sync.members.reached)
        if reached > self.progress.step:
            self.progress.step = reached
            self.progress.position = self.batches.at(reached - 1).next_position

    def save(self, *, best: bool = False) -> None:
        """Start to save a checkpoint of the steps done, unless there is one. Every rank calls it."""
        if not best and self.checkpoints.newest_step == self.progress.step:
            return
        self.settle()
        self._after_first(self.checkpoints.finish)
        self.saving = True
        if self.shared is None:
            with self.sync.shared_model(self.replica):
                self.shared = self.tensors()
        describe = partial(self.task.describe, self.replica.model)
        self.checkpoints.save(
            self.shared, self.progress, describe, part=self.part(), places=self._places, best=best
        )

    def settle(self) -> None:
        """Wait until what is being saved has been read; call before parameters change."""
        if self.saving:
            self._after_first(self.checkpoints.settle)
            self.saving = False

    def _after_first(self, work: Callable[[], None]) -> None:
        """Do `work`, which may be rank 0's alone, and wait for rank 0: an exchange would not wait for long."""
        work()
        if not self.sync.members.evaluates_alone:
            self.mesh.wire("world").wait_for_first()

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
        """The task's metrics over the whole "eval" split, {} if it is empty; None if `stop()` came true.

        A rank that evaluates alone, stopped before the last step, gives {}: it takes steps until the strategy says
        after which one all stop.
        """
        samples = self.task.samples("eval")
        alone = self.sync.members.evaluates_alone
        if not len(samples) or (alone and self.mesh.replicate.index):
            return {}
        self.settle()  # the shared model may be written over what is being copied
        island, placed = self.replica.island, self.replica.placed
        among = Evaluators(
            self.mesh.team,
            len(island.teams) if alone else self.mesh.teams,
            island.sum if alone else self.agree,
            in_step=len(island.teams),
        )
        with self.sync.shared_model(self.replica):
            self.shared = self.tensors()  # for a save of the same step
            placed.before_forward()
            measured = evaluate(
                placed,
                self.task.loss,  # never the compiled one: a second graph would cost more than it saves
                samples,
                micro_batch_size=self.batches.shape[1],
                among=among,
                policy=self.replica.policy,
                device=self.mesh.device,
                stop=(lambda: stop() or self.sync.members.hears_wish) if alone else stop,
            )
            placed.after_evaluation()
        if measured is None:
            return {} if alone and self.progress.step < self.total_steps else None
        return self.task.metrics(*measured)
