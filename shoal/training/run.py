"""A run: all that the loop needs on one rank, and where it stands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from torch import Tensor

from shoal.checkpoint import Progress
from shoal.config import RunConfig
from shoal.data.batches import Batch, Batches
from shoal.observe.console import Screen
from shoal.observe.memory import MemoryReport
from shoal.replica import Replica, Step
from shoal.sync import Sync
from shoal.tasks import Task
from shoal.training.balance import Balancer
from shoal.training.model import BuiltModel
from shoal.training.saving import Saver
from shoal.wire.mesh import Mesh


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a step."""

    loss: float  # for each label of the step
    seconds: list[float]  # of computing, by team
    stopping: bool  # whether any rank was asked to stop
    wall: float  # seconds that the step took on this rank


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

    def __post_init__(self) -> None:
        self._lap = perf_counter()

    @property
    def config(self) -> RunConfig:
        """The settings."""
        return self.built.config

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.built.mesh

    @property
    def task(self) -> Task:
        """What is learnt."""
        return self.built.task

    @property
    def batches(self) -> Batches:
        """The batches, from where the run began or went on."""
        return self.built.batches

    @property
    def total_steps(self) -> int:
        """The steps of the whole run."""
        return self.built.total_steps

    @property
    def bytes_sent(self) -> int:
        """By this rank so far: to other replicas, and within its own."""
        return self.mesh.bytes_sent

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks, as far as the strategy hears of them."""
        return self.replica.island.agree(self.sync.members.agree, numbers)

    def lap(self) -> float:
        """The seconds since the last call, or since the run was made."""
        before, self._lap = self._lap, perf_counter()
        return self._lap - before

    def commit(self, batch: Batch, step: Step, agreed: Agreed) -> None:
        """Count a step as done, tell who watches its loss, and balance the next one."""
        replica, progress = self.replica, self.progress
        progress.step = batch.step + 1
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
