"""A run: everything that the loop needs on one rank, and its progress."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from shoal.checkpoint import Progress
from shoal.config import RunConfig
from shoal.data.batches import Batch, Batches
from shoal.observe.console import Screen
from shoal.observe.memory import MemoryReport
from shoal.observe.trackers import Tracker
from shoal.replica import Replica, Step
from shoal.sync import Sync
from shoal.tasks import Task
from shoal.training.balance import Balancer
from shoal.training.model import BuiltModel
from shoal.training.saving import Saver
from shoal.wire.mesh import Mesh
from shoal.wire.waits import WAITS


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a step."""

    loss: float  # for each label of the step
    seconds: list[float]  # of computing, by team
    stopping: bool  # whether any rank was asked to stop
    wall: float  # seconds that the step took on this rank
    sent: int  # bytes that this rank has sent so far


@dataclass
class Run:
    """Everything the loop needs, on one rank."""

    built: BuiltModel
    folder: Path
    screen: Screen
    replica: Replica
    sync: Sync
    saver: Saver
    balancer: Balancer
    memory: MemoryReport
    progress: Progress
    watch: Callable[[float], None]  # hears the loss of every step
    trackers: list[Tracker] = field(default_factory=list)  # beside those of the settings

    def __post_init__(self) -> None:
        self.config: RunConfig = self.built.config
        self.mesh: Mesh = self.built.mesh
        self.task: Task = self.built.task
        self.batches: Batches = self.built.batches
        self.total_steps: int = self.built.total_steps
        self._lap = perf_counter()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent in training: to other replicas, and within its own."""
        return self.mesh.bytes_sent

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks; where ranks do not wait for each other, of those received so far."""
        return self.replica.island.agree(self.sync.members.agree, numbers)

    def agree(self, step: Step, stopping: bool) -> Agreed:
        """Share losses, seconds and wishes to stop by one small sum. Losses add up in micro-batch order."""
        mesh, count = self.mesh, len(step.losses)
        numbers = torch.zeros(count + mesh.teams + 2, dtype=torch.float64)
        numbers[:count] = step.losses
        numbers[count + mesh.team] = step.seconds.compute / mesh.size("team")
        numbers[-2:] = torch.tensor([step.own_labels if self.replica.island.is_first else 0, stopping])
        numbers = self.sum(numbers)
        loss = numbers[:count].sum() / numbers[-2].clamp(min=1)
        seconds, stops = numbers[count:-2].tolist(), bool(numbers[-1] > 0)
        return Agreed(loss.item(), seconds, stops, self.lap(), self.bytes_sent)

    def lap(self) -> float:
        """The seconds since the last call, or since the run was made."""
        before, self._lap = self._lap, perf_counter()
        return self._lap - before

    def commit(self, batch: Batch, step: Step, agreed: Agreed) -> None:
        """Count a step as done, tell who watches its loss, and balance the next one."""
        replica, progress = self.replica, self.progress
        progress.step = batch.step + 1
        WAITS.step = progress.step + 1
        progress.position = batch.next_position
        progress.tokens += batch.labels
        progress.seconds += agreed.wall
        progress.nonfinite_steps = replica.nonfinite_steps
        progress.nonfinite_total += step.skipped
        progress.scaler = replica.scaler.state_dict()
        progress.shares = replica.shares.counts
        self.watch(agreed.loss)
        replica.shares = self.balancer.observe(replica.shares, agreed.seconds)

    def leave(self) -> None:
        """Part from the others, once no save reads the parameters: a strategy may have to bring the final ones.

        Where ranks do not wait for each other, what the foremost has done counts as done.
        """
        self.saver.wait_until_read()
        self.sync.members.finish(self.replica)
        reached = min(self.total_steps, self.sync.members.reached)
        if reached > self.progress.step:
            self.progress.step = reached
            self.progress.position = self.batches.at(reached - 1).next_position
