"""`python -m bench.hosts`: what each of two hosts says of a fault, how it ends, and after how many seconds.

Hosts are network namespaces, so this needs root and Debian's iproute2. Then the cost of the pulse: the processor time
of its thread beside that of its worker, and its longest gap on a link of 1 Mbit/s that training fills.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import machine
from bench.links.hosts import Host, network, set_link
from shoal.engines.orphans import die_with_parent

STRATEGIES = ("allreduce", "diloco", "gossip", "async")
CORPUS = "net {} the fish swim, the tide goes out, the moon comes up and the tide comes in again. "
SMALL = [
    "--vocab-size", "400", "--model.hidden-size", "32", "--model.num-hidden-layers", "2",
    "--model.num-attention-heads", "2", "--model.intermediate-size", "64", "--sequence-length", "64",
    "--global-batch-size", "8", "--per-device-train-batch-size", "2",
]  # fmt: skip
LONG = ["--max-steps", "1000000", "--save-steps", "100"]
PATIENCE = 120.0


@dataclass
class Worker:
    """`shoal train` on one host."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> float:
        """The seconds until it has said `text`; infinite if it does not."""
        return _seconds(lambda: text in self.said())

    def end(self) -> float:
        """The seconds until it has ended."""
        return _seconds(lambda: self.process.poll() is not None)

    def last_line(self) -> str:
        """The last line that it has printed."""
        return (self.said().strip().splitlines() or [""])[-1]


class Run:
    """A run on two hosts, with a folder of its own."""

    def __init__(self, hosts: list[Host], folder: Path, strategy: str) -> None:
        self.hosts, self.folder, self.strategy = hosts, folder, strategy
        self.workers: list[Worker] = []

    def start(self, number: int, *words: str, **environ: str) -> Worker:
        """Start the worker of a host."""
        given = {
            "RANK": str(number), "WORLD_SIZE": str(len(self.hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.hosts[0].address, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        data = [
            "--data",
            str(self.folder.parent / "corpus"),
            "--cache-dir",
            str(self.folder.parent / "cache"),
        ]
        command = [
            sys.executable,
            "-m",
            "shoal",
            "train",
            *data,
            *SMALL,
            "--output-dir",
            str(self.folder / "run"),
        ]
        log = self.folder / f"log-{number}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.hosts[number].namespace, *command, "--strategy", self.strategy, *words],
                env={**os.environ, **given, **environ}, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        self.workers.append(Worker(process, log))
        return self.workers[-1]

    def both(self, *words: str) -> list[Worker]:
        """Start both, and wait until they have trained for a while."""
        started = [self.start(number, *words) for number in range(len(self.hosts))]
        wanted = self.steps() + 150
        _seconds(lambda: self.steps() >= wanted or any(w.process.poll() is not None for w in started))
        return started

    def steps(self) -> int:
        """The steps that are recorded."""
        file = self.folder / "run" / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0


Row = tuple[str, list[str]]


def different_settings(run: Run) -> Row:
    """Another learning rate on the second host."""
    began = time.monotonic()
    workers = [run.start(0, *LONG), run.start(1, *LONG, "--learning-rate", "0.1")]
    return _ends("another --learning-rate", workers, began)


def closed_port(run: Run) -> Row:
    """The second host has another port, and is stopped by Ctrl-C."""
    alone = run.start(1, *LONG, MASTER_PORT="29999")
    said = alone.wait_for("shoal: waiting for worker 0")
    began = time.monotonic()
    alone.process.send_signal(signal.SIGINT)
    name, cells = _ends("a closed port, then Ctrl-C", [alone], began)
    return name, [f"said after {said:.0f} s with the start", *cells]


def stopped_peer(run: Run) -> Row:
    """The second worker is stopped, then the first is asked to end."""
    first, second = run.both(*LONG)
    began = time.monotonic()
    second.process.send_signal(signal.SIGSTOP)
    said = first.wait_for("worker 1 on") if run.strategy != "async" else 0.0
    time.sleep(max(0.0, 12 - (time.monotonic() - began)))
    began = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    name, cells = _ends("a stopped peer, then SIGTERM", [first], began)
    second.process.send_signal(signal.SIGCONT)
    return name, [f"said after {said:.1f} s" if said else "trains on", *cells]


def link_down(run: Run) -> Row:
    """The link of the second host is down for 30 s."""
    workers = run.both(*LONG)
    set_link(run.hosts[1], up=False)
    before = run.steps()
    time.sleep(30)
    during = run.steps() - before
    set_link(run.hosts[1], up=True)
    wanted = run.steps() + 50
    again = _seconds(lambda: run.steps() >= wanted)
    quiet = [worker for worker in workers if "(silent) in" not in worker.said()]
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    name, cells = _ends("a link down for 30 s, then SIGTERM", workers, began)
    heard = (
        f"{len(workers) - len(quiet)} of 2 said so, {during} steps meanwhile, 50 more {again:.1f} s after it"
    )
    return name, [heard, *cells]


def killed_peer(run: Run) -> Row:
    """The second worker is killed."""
    first, second = run.both(*LONG)
    second.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    if run.strategy in ("gossip", "async"):
        wanted = run.steps() + 50
        again = _seconds(lambda: run.steps() >= wanted)
        first.process.send_signal(signal.SIGTERM)
        name, cells = _ends("a killed peer", [first], time.monotonic())
        return name, [f"goes on, 50 more steps after {again:.1f} s; then SIGTERM", *cells]
    return _ends("a killed peer", [first], began)


FAULTS = (different_settings, closed_port, stopped_peer, link_down, killed_peer)


def pulse(mbit: float | None, strategy: str) -> str:
    """What the pulse costs, and whether it called a rank silent that was not."""
    with _folder() as folder, network(2, mbit) as hosts:
        run = Run(hosts, folder, strategy)
        words = ["--max-steps", "60" if mbit else "3000", "--save-steps", "0", "--eval-steps", "0"]
        workers = [run.start(number, *words) for number in range(2)]
        seconds = max(worker.end() for worker in workers)
        summary = json.loads((run.folder / "run" / "summary.json").read_text())
        spent = summary["cpu_seconds_of_pulse"]
        of_core = 100 * spent / summary["seconds"]
        of_worker = 100 * spent / summary["cpu_seconds_per_worker"]
        alarms = sum(worker.said().count("(silent)") for worker in workers)
        link = f"{mbit:g} Mbit/s" if mbit else "as fast as it goes"
        gap = summary["pulse_longest_gap"]
        shares = f"{of_core:.3f} % | {of_worker:.3f} %"
        return f"| {strategy}, {link} | {shares} | {gap:.2f} s | {alarms} | {seconds:.0f} s |"


def main() -> None:
    """Print the tables of docs/benchmarks.md."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        sys.exit("bench.hosts: network namespaces need root and iproute2")
    print(f"{machine.describe()}\n")
    print("| fault | strategy | what happens | exit codes | seconds to the end | last line |")
    print("|---|---|---|---|---|---|")
    for fault in FAULTS:
        for strategy in STRATEGIES if fault not in (different_settings, closed_port) else STRATEGIES[:1]:
            with _folder() as folder, network(2, None) as hosts:
                run = Run(hosts, folder, strategy)
                try:
                    name, cells = fault(run)
                finally:
                    for worker in run.workers:
                        worker.process.kill()
                        worker.process.wait()
            cells = cells if len(cells) == 4 else ["", *cells]
            print(f"| {name} | {strategy} | {' | '.join(cells)} |", flush=True)
    print("\n| pulse | of a core | of its worker's processor time | longest gap | false alarms | run |")
    print("|---|---|---|---|---|---|")
    for strategy, mbit in (("allreduce", None), ("allreduce", 1), ("diloco", 1)):
        print(pulse(mbit, strategy), flush=True)


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="shoal-hosts-") as work:
        corpus = Path(work) / "corpus"
        corpus.mkdir()
        for number in range(24):
            (corpus / f"{number}.txt").write_text(CORPUS.format(number) * 40)
        run = Path(work) / "run"
        run.mkdir()
        yield run


def _ends(name: str, workers: list[Worker], began: float) -> Row:
    """How they end, from `began` on."""
    for worker in workers:
        worker.end()
    seconds = time.monotonic() - began
    codes = ", ".join(str(worker.process.returncode) for worker in workers)
    tracebacks = sum("Traceback" in worker.said() for worker in workers)
    assert not tracebacks, workers[0].said()
    return name, [codes, f"{seconds:.1f}", f"`{workers[0].last_line()}`"]


def _seconds(done: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > PATIENCE:
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
