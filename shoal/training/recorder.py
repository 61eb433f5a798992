"""What is recorded and shown of each step and each evaluation."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

from shoal.data.batches import Batch
from shoal.layouts.base import reduced_dtypes
from shoal.observe.console import GIB, shown_number, step_line
from shoal.observe.ledger import Ledger
from shoal.observe.memory import COPIES, Watch, parts_of, report
from shoal.observe.trackers import MetricsFile, TensorBoard
from shoal.optim import optimizers
from shoal.replica import Step
from shoal.training.run import Memory, Run


class Observer:
    """Writes metrics and lines on the rank that speaks, and the ledger on every rank, while the loop runs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.writers: list[MetricsFile | TensorBoard] = []
        if run.mesh.is_first:
            self.writers.append(MetricsFile(run.folder / "metrics.jsonl", run.progress.step))
            if "tensorboard" in run.config.log.report_to:
                self.writers.append(TensorBoard(run.folder / "tb", run.checkpoints.run, run.screen.say))
        self.ledger = _ledger(run) if run.config.log.ledger else None
        self.first_step = run.progress.step
        self.watched = min(self.first_step + 1, run.total_steps - 1)  # by then the optimizer has its state

    def __enter__(self) -> Self:
        self.run.screen.start_bar(self.run.total_steps, self.run.progress.step)
        self.started = self.last = time.perf_counter()
        self.sent = self.run.bytes_sent
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.screen.stop_bar()
        for writer in self.writers:
            writer.close()

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around what computes a step: the one that `--memory-report` is of runs under a watch, and slower."""
        if not self.run.config.log.memory_report or step != self.watched:
            yield
            return
        replica, sync = self.run.replica, self.run.sync
        held = [tensor for part in parts_of(replica, sync).values() for tensor in part]
        with Watch(held) as watch:
            yield
        self.run.memory = _memory(self.run, report(watch.peak, parts_of(replica, sync)))

    def step(self, batch: Batch, taken: Step, loss: float) -> None:
        """Record a step that has been taken, before it is committed."""
        run, replica = self.run, self.run.replica
        if self.ledger is not None and not run.mesh.index("team"):
            self.ledger.write(batch, replica.shares.of(run.mesh.team))
        if batch.step == self.first_step:
            _check_policy(run)
        now = time.perf_counter()
        run.progress.seconds += now - self.last
        record = _record(run, batch, taken, loss, now - self.last, run.bytes_sent - self.sent)
        self.last, self.sent = now, run.bytes_sent
        run.checkpoints.stalled = 0.0
        self._write(record)
        done = batch.step + 1
        run.screen.advance(done)
        if taken.skipped:
            now_at = f"; the loss scale is now {replica.scaler.scale:g}" if replica.scaler.dynamic else ""
            run.screen.say(f"step: {done} the gradient is not finite: nothing was updated{now_at}")
        if done % run.config.log.logging_steps == 0 or done in (self.first_step + 1, run.total_steps):
            each = (now - self.started) / (done - self.first_step)
            run.screen.say(step_line(record, each * (run.total_steps - done)))

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Validate, record and show it. None if `stop()` came true meanwhile."""
        metrics = self.run.evaluate(stop)
        if metrics:
            self._write({"step": self.run.progress.step, "tokens": self.run.progress.tokens, **metrics})
            shown = " ".join(f"{name}: {shown_number(value)}" for name, value in metrics.items())
            self.run.screen.say(f"step: {self.run.progress.step} {shown}")
        # The next step does not pay for this.
        self.last, self.sent = time.perf_counter(), self.run.bytes_sent
        return metrics

    def _write(self, record: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(record)


def peak_rss_gib() -> float:
    """The most memory this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB * (1 if sys.platform == "darwin" else 1024)


def _record(run: Run, batch: Batch, taken: Step, loss: float, seconds: float, sent: int) -> dict[str, Any]:
    spent = taken.seconds
    rate = batch.labels / seconds
    return {
        "step": batch.step + 1,
        "tokens": run.progress.tokens + batch.labels,
        "train/loss": loss,
        "train/grad_norm": taken.grad_norm,
        "train/learning_rate": taken.learning_rate,
        "train/skipped_steps": run.progress.nonfinite_total + taken.skipped,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": rate,
        "perf/tokens_per_second_per_device": rate / run.mesh.world_size,
        "perf/data_wait_pct": 100 * spent.data / seconds,
        "perf/compute_pct": 100 * spent.compute / seconds,
        "perf/comm_pct": 100 * spent.communication / seconds,
        "perf/optimizer_pct": 100 * spent.optimizer / seconds,
        "perf/save_stall_pct": 100 * run.checkpoints.stalled / seconds,
        "perf/comm_bytes": sent,
        "perf/micro_batches": run.replica.shares.counts,
        "mem/peak_rss_gib": peak_rss_gib(),
        **_device_memory(run.mesh.device),
        **run.replica.scaler.metrics(),
        **run.sync.metrics(),
    }


def _device_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors have held on a GPU."""
    return (
        {"mem/peak_device_gib": torch.cuda.max_memory_allocated(device) / GIB}
        if device.type == "cuda"
        else {}
    )


def _memory(run: Run, measured: dict[str, int]) -> Memory:
    """What was measured, and what arithmetic has beside it, by part."""
    replica = run.replica
    predicted = replica.placed.held() | {
        "gradients": sum(bucket.flat.nbytes for bucket in replica.buckets),
        "optimizer state": optimizers.state_bytes(replica.optimizers),
        "sync and codec": run.sync_cost.held,
        COPIES: 2 * sum(p.nbytes for _, p in replica.params),
    }
    return {part: {"bytes": found, "formula": predicted.get(part)} for part, found in measured.items()}


def _check_policy(run: Run) -> None:
    replica = run.replica
    params, state = [p for _, p in replica.params], (t for _, t in replica.optimizer_state.tensors())
    reduced = {bucket.flat.dtype for bucket in replica.buckets} | reduced_dtypes(replica.placed)
    replica.policy.check(params, state, reduced)


def _ledger(run: Run) -> Ledger:
    """This rank's ledger, under a number that is higher at each start of the run and the same on all ranks."""
    attempt = torch.tensor([time.time_ns()])
    run.mesh.wire("world").broadcast(attempt)
    return Ledger(run.folder / "ledger", run.mesh.rank, int(attempt), run.batches)
