"""One training job run by one tool: started as a user starts it, watched step by step, ended when measured."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import psutil

WORKERS = 2
MICRO_BATCH = 8
PIPELINED_MICRO_BATCH = 2
GLOBAL_BATCH = 16
WINDOW = 256
WARM_UP, TIMED = 3, 6  # steps
MODEL = [
    *("--model", "llama-tiny", "--model.hidden-size", "256", "--model.num-hidden-layers", "6"),
    *("--model.num-attention-heads", "4", "--model.intermediate-size", "688"),
]
LAYOUTS = {  # how shoal is asked for them
    "zero2": ["--strategy", "zero2"],
    "zero3": ["--strategy", "zero3"],
    "tp": ["--tp", str(WORKERS)],
    "pp": ["--pp", str(WORKERS)],
}
POLL = 0.02
PATIENCE = 900.0  # seconds without the steps asked for
SHOAL = str(Path(sys.executable).with_name("shoal"))


@dataclass(frozen=True)
class Job:
    """What is trained, with which tool: "shoal" or a module of `bench.peers`."""

    tool: str
    precision: str = "bf16"
    compile: bool = False
    exact: bool = False
    layout: str = ""  # one of `LAYOUTS`; empty: whole replicas
    defaults: str = ""  # nothing set but model, data and batch; the value says how it is launched

    @property
    def micro_batch(self) -> int:
        """Windows in one; a pipeline wants several in a step."""
        return PIPELINED_MICRO_BATCH if self.layout == "pp" else MICRO_BATCH

    def __str__(self) -> str:
        said = [f"defaults, {self.defaults}"] if self.defaults else [self.precision]
        said += [name for name in ("compile", "exact") if getattr(self, name)]
        said += [self.layout] if self.layout else []
        return f"{self.tool} ({', '.join(said)})"


@dataclass(frozen=True)
class Turn:
    """What one run of a job showed: a record of every step, as in shoal's metrics.jsonl."""

    first_step: float  # seconds from the start of the command to the first record
    records: list[dict[str, Any]]

    @cached_property
    def step_seconds(self) -> float:
        """The mean of the timed steps."""
        return mean(record["perf/step_seconds"] for record in self.records[WARM_UP:])

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together."""
        return GLOBAL_BATCH * WINDOW / self.step_seconds

    @property
    def peak_gib(self) -> float:
        """The most resident memory that worker 0 has held (VmHWM)."""
        return float(self.records[-1]["mem/peak_rss_gib"])

    @property
    def compile_seconds(self) -> float:
        """What the first steps took longer than the timed ones."""
        warm_up = self.records[:WARM_UP]
        return sum(record["perf/step_seconds"] for record in warm_up) - len(warm_up) * self.step_seconds

    @property
    def data_wait_percent(self) -> float:
        """Share of the timed steps that shoal waited for data."""
        timed = self.records[WARM_UP:]
        waited = sum(r["perf/data_wait_pct"] * r["perf/step_seconds"] for r in timed)
        return waited / sum(r["perf/step_seconds"] for r in timed)


@dataclass(frozen=True)
class Corpus:
    """The data of all jobs: shoal's cache, and the tokens of the same corpus as plain windows for the peers."""

    work: Path
    cache: Path
    tokenizer: Path
    windows: Path


def run(job: Job, corpus: Corpus) -> Turn:
    """Run a job until its steps are measured. Raises RuntimeError with its last words if it ends before."""
    with TemporaryDirectory(dir=corpus.work) as name:
        folder, log = Path(name, "run"), Path(name, "log")
        folder.mkdir()
        metrics = folder / "metrics.jsonl"
        commands = _shoal(job, corpus, folder) if job.tool == "shoal" else _peer(job, corpus, metrics)
        began = time.perf_counter()
        with _running(commands, log) as processes:
            _wait_for(metrics, 1, processes, log)
            first_step = time.perf_counter() - began
            _wait_for(metrics, WARM_UP + TIMED, processes, log)
        lines = metrics.read_text().splitlines()[: WARM_UP + TIMED]
    return Turn(first_step, [json.loads(line) for line in lines])


Command = tuple[list[str], dict[str, str]]  # words, and what they find in their environment


def _shoal(job: Job, corpus: Corpus, folder: Path) -> list[Command]:
    words = [SHOAL, "train", "--data", "builtin", *MODEL, "--cache-dir", str(corpus.cache)]
    words += ["--global-batch-size", str(GLOBAL_BATCH), "--per-device-train-batch-size", str(job.micro_batch)]
    words += ["--output-dir", str(folder)]
    if not job.defaults:
        words += ["--nproc-per-node", str(WORKERS), "--threads", "1", "--sequence-length", str(WINDOW)]
        words += ["--bf16" if job.precision == "bf16" else "--no-bf16"]
        words += ["--compile"] * job.compile + ["--exact"] * job.exact
        words += LAYOUTS[job.layout] if job.layout else []
    return [(words, _environment(job, corpus))]


def _peer(job: Job, corpus: Corpus, metrics: Path) -> list[Command]:
    module = ["-m", f"bench.peers.{job.tool}", "--windows", str(corpus.windows), "--metrics", str(metrics)]
    shared = _environment(job, corpus)
    if job.defaults == "python":
        return [([sys.executable, *module, "--defaults", "--batch", str(GLOBAL_BATCH)], shared)]
    if job.defaults == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
        return [([sys.executable, *launcher, *module, "--defaults", "--batch", str(MICRO_BATCH)], shared)]
    words = [sys.executable, *module, "--batch", str(job.micro_batch), "--precision", job.precision]
    words += ["--compile"] * job.compile + (["--layout", job.layout] if job.layout else [])
    return [(words, shared | {"OMP_NUM_THREADS": "1"} | place) for place in places(WORKERS)]


def places(ranks: int) -> list[dict[str, str]]:
    """What each of so many workers on this machine finds in its environment, as torchrun has it."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _environment(job: Job, corpus: Corpus) -> dict[str, str]:
    """Every tool compiles anew in its first turn, and finds that again in the next ones."""
    compiled = corpus.work / f"compiled-{job.tool}"
    return {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_CACHE_DIR": str(compiled)}


@contextmanager
def _running(commands: list[Command], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("wb") as out:
        processes = [
            subprocess.Popen(words, env=inherited | own, stdout=out, stderr=subprocess.STDOUT)
            for words, own in commands
        ]
        try:
            yield processes
        finally:
            _end(processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill these processes and all below them."""
    alive = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    family = [each for process in alive for each in (process, *process.children(recursive=True))]
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family)
    for popen in processes:
        popen.wait()


def _wait_for(metrics: Path, steps: int, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        ended = any(process.poll() is not None for process in processes)
        if ended or time.monotonic() > deadline:
            last_words = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"fewer than {steps} steps from {processes[0].args!r}:\n{last_words}")
        time.sleep(POLL)


def free_port() -> int:
    """A port of the loopback address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
