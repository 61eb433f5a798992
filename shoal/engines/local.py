"""The local engine: start workers on this machine, watch them, and report what went wrong in one line."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.config import Resolved, check_options, idle_gpus, resolve_grid, resolve_threads, resolve_workers
from shoal.engines.environment import INTERFACES, STORE_FD, is_worker, machine
from shoal.engines.signals import NOTHING_TO_SAVE, Stop, heard
from shoal.engines.worker import AT_ONCE, ERRORS, FOUND, JOB, began, end, work
from shoal.errors import BAD_INPUT, DONE, LESS_MEMORY, PREEMPTED, NoRoom, Preempted, ShoalError, UserError
from shoal.system import helpers, output
from shoal.system.run_folder import RunFolder
from shoal.wire.cards import TOKEN

LOOPBACK = "127.0.0.1"
GRACE = 10.0  # seconds a worker gets to save and leave before it is killed
POLL = 0.05
# What the environment may set otherwise.
DEFAULTS = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # else a worker whose neighbour has left warns of it, with C++ frames
    # For Linux's C library: keep freed memory, in huge pages. A step frees and takes hundreds of megabytes: page
    # faults fell to a ninth, processor time by 3 to 10 % (llama-tiny, 8 x 256 tokens, one thread).
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def launch(resolved: Resolved, verb: str = "train") -> Any:
    """Do `verb` ("train" or "evaluate") to its end, on as many workers as the configuration says.

    Returns what rank 0 found: of an evaluation the metrics, of training None. Under an engine that has set rank and
    world size (torchrun, MPI, Slurm) this process is one of the workers. Raises UserError for bad input, whoever
    found it, Preempted or KeyboardInterrupt where the run was asked to stop, and ShoalError where it failed.
    """
    output.occupy()  # stdout closed, a worker could take the socket of the store for it
    if verb == "train":
        check_options(resolved)
        check_folder(resolved)
    if is_worker():
        return work(verb, resolved, Stop(end))
    config, here = resolved.config, machine(resolved.config)
    workers = resolve_workers(config, here)
    grid = resolve_grid(config, workers)
    if idle := idle_gpus(config, workers, here):
        output.say(f"shoal: {idle}")
    check_loopback()
    threads = resolve_threads(config, workers, here)
    with _private_folder() as folder:
        started = Workers(resolved, verb, workers, folder, threads, whole=grid["replicate"] == workers)
        with heard(started.pass_on, signal.SIGINT, signal.SIGTERM):
            started.run()
        found = folder / FOUND
        return json.loads(found.read_text()) if found.exists() else None


def check_folder(resolved: Resolved) -> None:
    """Refuse a folder that is not this run's to write in, or to resume nothing; before any worker is started."""
    config = resolved.config.checkpoint
    resumed = config.resume_from_checkpoint
    if resumed not in ("", "latest") and not Path(resumed).is_dir():
        found = "there is no such folder"
        raise UserError(f"--resume-from-checkpoint {resumed}", found, "give a checkpoint folder, or latest")
    place = RunFolder(Path(config.output_dir))
    place.check(anew=config.begins_anew, overwrite=config.overwrite_output_dir)


def check_loopback() -> None:
    """Refuse a machine on which workers could not meet; they would wait for each other for minutes."""
    try:
        with (
            socket.create_server((LOOPBACK, 0)) as listener,
            socket.create_connection(listener.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        found = f"a process cannot connect to another on {LOOPBACK} ({error})"
        change = "let the sandbox or container have a loopback interface (`ip link set lo up`)"
        raise UserError("the workers of this machine", found, change) from None


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for messages between launcher and workers, which no other user can read."""
    try:
        made = tempfile.TemporaryDirectory(prefix="shoal-")
    except OSError as error:
        found = f"no folder could be made there ({error.strerror})"
        raise UserError("TMPDIR", found, "set it to a folder that can be written") from None
    with made as name:
        yield Path(name)


class Workers:
    """The processes of one launch."""

    def __init__(
        self, resolved: Resolved, verb: str, count: int, errors: Path, threads: int, *, whole: bool = True
    ) -> None:
        self.config = resolved.config
        self.count = count
        self.threads = threads
        self.errors = errors
        self.whole = whole  # whether each holds a replica of its own, and can be missed
        self.interrupted = False
        self.signals = 0
        self.spared: set[int] = set()  # ranks that were killed from outside, and that the others do without
        self.stuck: set[int] = set()  # workers that did not notice that another failed, and were killed here
        job = {"verb": verb, "config": resolved.config.model_dump(), "origins": resolved.origins}
        (errors / JOB).write_text(json.dumps(job))
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Start all and wait for them; raises as `launch` does. None is left when this ends.

        One that fails takes the rest with it, unless these can spare it.
        """
        try:
            self._start_all()
            while None in (codes := [p.poll() for p in self.processes]):
                self.spared |= {rank for rank, code in enumerate(codes) if self._can_spare(rank, code)}
                if any(
                    code not in (None, DONE, PREEMPTED) and rank not in self.spared
                    for rank, code in enumerate(codes)
                ):
                    refused = BAD_INPUT in codes  # before any work: nobody has anything to save
                    self._end_all(grace=0 if refused else GRACE)
                    break
                time.sleep(POLL)
        finally:
            self._end_all(grace=0)
        self._judge()

    def _start_all(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            env = self._environment(listener)
            for rank in range(self.count):
                self.processes.append(self._start(env, rank, listener))
                if self.signals:  # it came while this one was on its way, and has not heard it
                    self._signal_all()

    def _environment(self, listener: socket.socket) -> dict[str, str]:
        threads = str(self.threads)
        given = {
            **helpers.imports(),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(listener.getsockname()[1]),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            ERRORS: str(self.errors),
            TOKEN: secrets.token_hex(16),
        }
        if sys.platform == "linux":
            given[INTERFACES] = "lo"  # else the interface that the host's name resolves to
        return {**DEFAULTS, **os.environ, **given}

    def _start(self, env: dict[str, str], rank: int, listener: socket.socket) -> subprocess.Popen[bytes]:
        env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        inherited: tuple[int, ...] = ()
        if rank == 0:
            env[STORE_FD] = str(listener.fileno())
            inherited = (listener.fileno(),)
        command = helpers.command("shoal.engines.worker")
        # A session of its own keeps Ctrl-C from the workers: it comes through `pass_on` as a wish to stop.
        return subprocess.Popen(command, env=env, pass_fds=inherited, start_new_session=True)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the workers to save and leave; asked a second time, kill them."""
        self.signals += 1
        self.interrupted = self.interrupted or number == signal.SIGINT or self.signals > 1
        self._signal_all()

    def _signal_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)
                process.send_signal(signal.SIGCONT)  # one that was stopped hears it, too

    def _end_all(self, grace: float) -> None:
        """Give the workers `grace` seconds to leave, since they see the links of a failed one torn; then kill."""
        deadline = time.monotonic() + grace
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stuck.add(process.pid)
                process.kill()
                process.wait()

    def _can_spare(self, rank: int, code: int | None) -> bool:
        """Whether a worker was killed from outside, during training, under a strategy that goes on without it."""
        killed = code is not None and code < 0 and not self.signals
        training = (self.errors / began(rank)).exists()
        return killed and training and self.whole and self.config.strategy.can_lose(rank)

    def _judge(self) -> None:
        """Raise the root cause of what went wrong, if anything did."""
        codes = [p.returncode for p in self.processes]
        if not any(code for rank, code in enumerate(codes) if rank not in self.spared):
            return
        records = [json.loads(path.read_text()) for path in self.errors.glob("rank-*.json")]
        if self.interrupted:
            raise KeyboardInterrupt(_first(records)["message"] if records else "interrupted")
        own = {rank: p.returncode for rank, p in enumerate(self.processes) if p.pid not in self.stuck}
        orderly = all(own[r] in (DONE, PREEMPTED) for r in own.keys() - self.spared)
        left = [record for record in records if record["exit_code"] == PREEMPTED]
        # A worker that had nothing to save, or waited in vain; others may miss it.
        at_once = not {-signal.SIGTERM, AT_ONCE}.isdisjoint(own.values())
        if orderly or at_once:
            raise Preempted(_first(left)["message"] if left else NOTHING_TO_SAVE)
        failed = [r for r in records if r["exit_code"] != PREEMPTED]  # the others leave while rank 0 saves
        failed = [r for r in failed if not r["lost"]]  # they miss another, which is the cause
        refused = [r for r in failed if not r["traceback"]]
        silent = [rank for rank, code in own.items() if code < 0]
        if silent and not refused:
            raise ShoalError(
                f"worker {silent[0]} was killed by {signal.Signals(-codes[silent[0]]).name}; if the machine ran out "
                f"of memory {LESS_MEMORY}; go on with --resume-from-checkpoint latest"
            )
        if not failed:
            rank, code = next((rank, code) for rank, code in own.items() if code not in (DONE, PREEMPTED))
            raise ShoalError(f"worker {rank} ended with exit code {code} and left no message")
        root = _first(refused or failed)
        if root["refusal"]:
            raise UserError(*root["refusal"])
        if root["traceback"]:
            self._show(root)
            raise ShoalError(f"{root['message']} (worker {root['rank']}; its traceback is above)")
        raise NoRoom(root["message"]) if root["exit_code"] == BAD_INPUT else ShoalError(root["message"])

    def _show(self, root: dict[str, Any]) -> None:
        """Print the traceback of an error, and keep a copy in the run's folder if that can be written."""
        output.say(root["traceback"])
        folder = RunFolder(Path(self.config.checkpoint.output_dir))
        folder.keep_error(root["rank"], json.dumps(root, indent=1))


def _first(records: list[dict[str, Any]]) -> dict[str, Any]:
    return min(records, key=lambda record: record["time"])
