"""One run of one cell: a worker on each host, watched record by record, ended when the last validation is in."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from bench.links.cells import Cell, Settings, command
from bench.links.hosts import INTERFACE, Host, bytes_moved, network
from shoal.engines.local import DEFAULTS
from shoal.engines.orphans import die_with_parent

WARM_UP = 3  # steps that the means leave out; the time to a loss counts them
PATIENCE = 600.0  # seconds without a record: compiling on a busy machine takes minutes
POLL = 0.02
PORT = "29500"
MOVED = "link/bytes"  # added to a record: the most that any host sent or received since the record before

Record = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """What a run showed, from the records of rank 0. Seconds leave out what validating took."""

    records: list[Record]

    @cached_property
    def steps(self) -> list[Record]:
        """A record of each step."""
        return [record for record in self.records if "perf/step_seconds" in record]

    @cached_property
    def losses(self) -> list[tuple[float, float]]:
        """Of each validation the seconds of training before it, and the loss in nats a token."""
        spent, points = 0.0, []
        for record in self.records:
            spent += record.get("perf/step_seconds", 0.0)
            if "eval/loss" in record:
                points.append((spent, record["eval/loss"]))
        return points

    def seconds_to(self, loss: float) -> float | None:
        """When the line through the validations crosses `loss` for the first time; None if it never does."""
        before: tuple[float, float] | None = None
        for seconds, reached in self.losses:
            if reached <= loss:
                if before is None or before[1] == reached:
                    return seconds
                return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - reached)
            before = seconds, reached
        return None

    def mean(self, name: str) -> float:
        """The mean of a number over the steps after the warm-up; NaN where a tool does not record it."""
        return mean(record.get(name, float("nan")) for record in self.steps[WARM_UP:])

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, after the warm-up."""
        first, last = self.steps[WARM_UP - 1], self.steps[-1]
        seconds = sum(record["perf/step_seconds"] for record in self.steps[WARM_UP:])
        return float(last["tokens"] - first["tokens"]) / seconds

    @property
    def exposed_seconds(self) -> float:
        """Of a step: the time in which a worker waited for the link and computed nothing."""
        timed = self.steps[WARM_UP:]
        return mean(r["perf/comm_pct"] / 100 * r["perf/step_seconds"] for r in timed)


def run(cell: Cell, settings: Settings, hosts: int, mbit: float | None) -> Curve:
    """Train a cell on hosts of its own. Raises RuntimeError with a worker's last words if it does not end."""
    with TemporaryDirectory(dir=settings.work) as name, network(hosts, mbit) as places:
        folder = Path(name)
        words = command(cell, settings, folder / "run")
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(settings.work / f"compiled-{cell.tool}")}
        with _working(words, compiled, places, folder) as processes:
            return Curve(list(_records(folder, processes, settings.steps)))


@contextmanager
def _working(
    words: list[str], environment: dict[str, str], hosts: list[Host], folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The command on every host as a rank of one world. A session of their own keeps Ctrl-C from them."""
    processes = []
    try:
        for rank, host in enumerate(hosts):
            with (folder / f"log-{rank}").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host.namespace, *words],
                        env=os.environ | DEFAULTS | environment | _place(rank, hosts),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _place(rank: int, hosts: list[Host]) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": PORT,
        "HOST_ADDR": hosts[rank].address,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _records(folder: Path, processes: list[subprocess.Popen[bytes]], steps: int) -> Iterator[Record]:
    """Every record as it is written, up to the validation after the last step."""
    metrics, read = folder / "run" / "metrics.jsonl", 0
    before = [0] * len(processes)
    last = time.monotonic()
    while True:
        text = metrics.read_bytes()[read:] if metrics.exists() else b""
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        if not lines:
            if any(p.poll() for p in processes) or all(p.poll() is not None for p in processes):
                raise RuntimeError(_last_words(folder, processes))
            if time.monotonic() - last > PATIENCE:
                raise RuntimeError(f"nothing for {PATIENCE:.0f} s; {_last_words(folder, processes)}")
            time.sleep(POLL)
            continue
        read, last = read + text.rfind(b"\n") + 1, time.monotonic()
        now = [_moved(process, b) for process, b in zip(processes, before, strict=True)]
        moved = max(n - b for n, b in zip(now, before, strict=True)) / len(lines)
        before = now
        for record in map(json.loads, lines):
            yield record | {MOVED: moved}
            if "eval/loss" in record and record["step"] == steps:
                return


def _moved(process: subprocess.Popen[bytes], before: int) -> int:
    try:
        return bytes_moved(process.pid)
    except OSError:  # it is done, and may be earlier than rank 0
        return before


def _last_words(folder: Path, processes: list[subprocess.Popen[bytes]]) -> str:
    """What the first worker that ended said last."""
    ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
    rank = next((r for r in ended if processes[r].returncode), 0)
    said = (folder / f"log-{rank}").read_text(errors="replace").strip().splitlines()
    return f"worker {rank}: {said[-1] if said else 'no word'}"
