"""Records and shows each step and each evaluation. It reads the run, and changes nothing."""

import resource
import sys
import time
from types import TracebackType
from typing import Any, Self

import torch

from shoal.data.batches import Batch
from shoal.layouts.base import reduced_dtypes
from shoal.observe.console import GIB, shown_number, step_line
from shoal.observe.ledger import Ledger
from shoal.observe.trackers import Tracker, trackers
from shoal.replica import Replica, Step
from shoal.training.run import Agreed, Run
from shoal.wire.waits import WAITS


class Recorder:
    """Writes metrics to the trackers and lines to the screen on rank 0, and the ledger on every rank."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trackers: list[Tracker] = []
        if run.mesh.is_first:
            names, own = run.config.log.report_to, run.saver.checkpoints.run
            self.trackers = trackers(names, run.folder, run.progress.step, own, run.screen.say) + run.trackers
        self.ledger = _ledger(run) if run.config.log.ledger else None
        self.first_step = run.progress.step
        self.sent, self.stalled = 0, 0.0  # bytes and seconds, when the last step ended

    def __enter__(self) -> Self:
        self.run.screen.start_bar(self.run.total_steps, self.run.progress.step)
        self.started, self.waited = time.perf_counter(), WAITS.stalled
        self.sent = self.run.bytes_sent
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.screen.stop_bar()
        for tracker in self.trackers:
            tracker.close()

    def step(self, batch: Batch, step: Step, agreed: Agreed) -> None:
        """Record a step, before it is committed."""
        run, replica = self.run, self.run.replica
        if self.ledger is not None and not run.mesh.index("team"):
            self.ledger.write(batch, replica.shares.of(run.mesh.team))
        if batch.step == self.first_step:
            _check_policy(replica)
        sent, stalled = agreed.sent, run.saver.checkpoints.stalled
        record = _record(run, batch, step, agreed)
        record["perf/save_stall_pct"] = 100 * (stalled - self.stalled) / agreed.wall
        record["perf/comm_bytes"] = sent - self.sent
        self.sent, self.stalled = sent, stalled
        self._write(record)
        done = batch.step + 1
        run.screen.advance(done)
        if step.skipped:
            scale = f"; the loss scale is now {replica.scaler.scale:g}" if replica.scaler.dynamic else ""
            run.screen.say(f"step: {done} the gradient is not finite: nothing was updated{scale}")
        if done % run.config.log.logging_steps == 0 or done in (self.first_step + 1, run.total_steps):
            trained = time.perf_counter() - self.started - (WAITS.stalled - self.waited)
            each = trained / (done - self.first_step)
            run.screen.say(step_line(record, each * (run.total_steps - done)))

    def evaluation(self, metrics: dict[str, float] | None) -> dict[str, float] | None:
        """Record and show the metrics of an evaluation, and return them."""
        run = self.run
        if metrics:
            self._write({"step": run.progress.step, "tokens": run.progress.tokens, **metrics})
            shown = " ".join(f"{name}: {shown_number(value)}" for name, value in metrics.items())
            run.screen.say(f"step: {run.progress.step} {shown}")
        self.sent = run.bytes_sent  # the next step does not pay for it
        return metrics

    def _write(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.write(record)


def peak_rss_gib() -> float:
    """The most memory this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB * (1 if sys.platform == "darwin" else 1024)


def _record(run: Run, batch: Batch, step: Step, agreed: Agreed) -> dict[str, Any]:
    spent, seconds = step.seconds, agreed.wall
    rate = batch.labels / seconds
    return {
        "step": batch.step + 1,
        "tokens": run.progress.tokens + batch.labels,
        "train/loss": agreed.loss,
        "train/grad_norm": step.grad_norm,
        "train/learning_rate": step.learning_rate,
        "train/skipped_steps": run.progress.nonfinite_total + step.skipped,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": rate,
        "perf/tokens_per_second_per_device": rate / run.mesh.world_size,
        "perf/data_wait_pct": 100 * spent.data / seconds,
        "perf/compute_pct": 100 * spent.compute / seconds,
        "perf/comm_pct": 100 * spent.communication / seconds,
        "perf/optimizer_pct": 100 * spent.optimizer / seconds,
        "perf/save_stall_pct": 0.0,
        "perf/comm_bytes": 0,
        "perf/micro_batches": run.replica.shares.counts,
        "mem/peak_rss_gib": peak_rss_gib(),
        **_device_memory(run.mesh.device),
        **run.replica.scaler.metrics(),
        **run.sync.metrics(),
    }


def _device_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors have held on a GPU."""
    if device.type != "cuda":
        return {}
    return {"mem/peak_device_gib": torch.cuda.max_memory_allocated(device) / GIB}


def _check_policy(replica: Replica) -> None:
    params, state = [p for _, p in replica.params], (t for _, t in replica.optimizer_state.tensors())
    reduced = {bucket.flat.dtype for bucket in replica.buckets} | reduced_dtypes(replica.placed)
    replica.policy.check(params, state, reduced)


def _ledger(run: Run) -> Ledger:
    """This rank's ledger, under an attempt number that rises with each start and is the same on all ranks."""
    attempt = torch.tensor([time.time_ns()])
    run.mesh.wire("world").broadcast(attempt)
    return Ledger(run.folder / "ledger", run.mesh.rank, int(attempt), run.batches)
