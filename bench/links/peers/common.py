"""What the peers share with shoal and each other: model, batches, loss, schedule and validation of the main job.

The model and its loss are those that shoal's own task makes, so that a peer computes as fast as shoal does, the
curves of all synchronous cells are the same to rounding, and what differs is how the replicas agree.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.config import load_config
from shoal.config.batch import resolve_batch
from shoal.data.batches import Batch, Batches
from shoal.layouts.base import whole_model
from shoal.optim import optimizers
from shoal.shares import equal
from shoal.tasks import TASKS
from shoal.tensors import precision
from shoal.training.evaluate import Evaluators, evaluate


class Job:
    """The main job as this worker has it: `flags` are those of `shoal train`."""

    def __init__(self, flags: list[str]) -> None:
        config = load_config(None, flags).config
        self.train = config.train
        self.evaluate_every = config.eval.eval_steps
        torch.set_num_threads(int(config.train.threads))
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        batch = resolve_batch(config, self.world_size)
        task = TASKS[config.train.task]
        self.task = task.task(config, task.prepare(config, False))
        self.model: nn.Module = self.task.model().train()
        self.batches = Batches(
            self.task.samples("train"),
            seed=config.train.seed,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.per_device_train_batch_size,
        )
        self.share = equal(batch.micro_batches, self.world_size).of(self.rank)
        self.policy = precision.resolve(config.train.precision, torch.device("cpu"))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        options = optimizers.of_config(config)
        (self.optimizer,) = optimizers.build("adamw", named, options)
        self._loss = torch.compile(self.task.loss, dynamic=False) if self.train.compile else self.task.loss
        self.record = Record(Path(config.checkpoint.output_dir), speaks=self.rank == 0)

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss summed over the labels of a micro-batch."""
        with self.policy.autocast(torch.device("cpu")):
            return self._loss(self.model, inputs)

    def own_labels(self, batch: Batch) -> int:
        """How many labels this worker's share of a step has."""
        return batch.label_count(slice(self.share.start, self.share.stop))

    def update(self, step: int) -> None:
        """Clip, set the rate, step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
        rate = optimizers.learning_rate(
            step,
            peak=self.optimizer.defaults["lr"],
            total_steps=self.train.max_steps,
            warmup_steps=self.train.warmup_steps,
            kind=self.train.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def validation_due(self, step: int) -> bool:
        """After the steps at which shoal validates, too."""
        return (step + 1) % self.evaluate_every == 0 or step + 1 == self.train.max_steps

    def validate(self) -> float:
        """The loss a token over all held-out windows, shared out among the workers of the default group."""

        def summed(numbers: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(numbers)
            return numbers

        measured = evaluate(
            whole_model(self.model, self.task.loss),
            self.task.measure,
            self.task.samples("eval"),
            micro_batch_size=self.batches.shape[1],
            among=Evaluators(dist.get_rank(), dist.get_world_size(), summed),
            policy=self.policy,
            device=torch.device("cpu"),
        )
        assert measured is not None
        return measured.sums[0] / measured.labels


class Record:
    """A line of JSON a step and a validation, under the names that shoal gives them."""

    def __init__(self, folder: Path, *, speaks: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "metrics.jsonl").open("a") if speaks else None
        self.tokens = 0

    def start(self) -> None:
        """The first step begins."""
        self.last = time.perf_counter()

    def step(self, step: int, labels: int, exposed: float) -> None:
        """Step `step` is over; `exposed` seconds of it were spent waiting for others."""
        now = time.perf_counter()
        self.tokens += labels
        seconds = now - self.last
        times = {"perf/step_seconds": seconds, "perf/comm_pct": 100 * exposed / seconds}
        self._write({"step": step + 1, "tokens": self.tokens, **times})
        self.last = now

    def validated(self, step: int, loss: float) -> None:
        """After step `step`; the next one does not pay for it."""
        self._write({"step": step + 1, "tokens": self.tokens, "eval/loss": loss})
        self.last = time.perf_counter()

    def _write(self, record: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def arguments(flag: str, default: int, meaning: str) -> tuple[int, Job]:
    """The peer's own number, and the job that the other words describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument(flag, dest="number", type=int, default=default, help=meaning)
    options, words = parser.parse_known_args()
    return options.number, Job(words)
