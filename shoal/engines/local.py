"""The local engine: start workers on this machine, watch them, and tell what went wrong in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.config import Resolved, check_options, resolve_grid, resolve_workers
from shoal.engines.environment import STORE_FD, is_worker
from shoal.engines.worker import ERRORS, JOB, began, work
from shoal.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PREEMPTED, ShoalError, UserError

GRACE = 10.0  # seconds a worker gets to save and leave before it is killed
POLL = 0.05
# For Linux's C library: keep freed memory, in huge pages. A step frees and takes hundreds of megabytes: page faults
# fell to a ninth, processor time by 3 to 10 % (llama-tiny, 8 x 256 tokens, one thread).
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def launch(resolved: Resolved, verb: str = "train") -> int:
    """Do `verb` ("train" or "evaluate") on as many workers as the configuration says; returns the exit code.

    Under an engine that has set rank and world size (torchrun, MPI, Slurm) this process is one of the workers.
    Raises UserError before any worker starts where the configuration is at odds with itself or its folder.
    """
    if verb == "train":
        check_options(resolved)
        check_folder(resolved)
    if is_worker():
        work(verb, resolved)
        return DONE
    workers = resolve_workers(resolved.config)
    grid = resolve_grid(resolved.config, workers)
    with tempfile.TemporaryDirectory(prefix="shoal-") as errors:
        return Workers(resolved, verb, workers, Path(errors), whole=grid["replicate"] == workers).run()


def check_folder(resolved: Resolved) -> None:
    """Refuse to write over what a run has left, unless it is resumed or may be overwritten; or to resume nothing."""
    config = resolved.config.checkpoint
    folder, resumed = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}", "it is a file", "name a folder")
    if resumed not in ("", "latest") and not Path(resumed).is_dir():
        found = "there is no such folder"
        raise UserError(f"--resume-from-checkpoint {resumed}", found, "give a checkpoint folder, or latest")
    if config.resume_from_checkpoint or config.overwrite_output_dir:
        return
    if (folder / "summary.json").exists():
        found = "it holds a finished run"
    elif any(folder.glob("checkpoint-*")):
        found = "it holds an unfinished run (go on with --resume-from-checkpoint latest)"
    else:
        return
    raise UserError(f"--output-dir {folder}", found, "name another one, or add --overwrite-output-dir")


class Workers:
    """The processes of one launch."""

    def __init__(
        self, resolved: Resolved, verb: str, count: int, errors: Path, *, whole: bool = True
    ) -> None:
        self.config = resolved.config
        self.errors = errors
        self.whole = whole  # whether each holds a replica of its own, and can be missed
        self.interrupted = False
        self.signals = 0
        self.spared: set[int] = set()  # ranks that were killed from outside, and that the others do without
        self.stuck: set[int] = set()  # workers that did not notice that another failed, and were killed here
        job = {"verb": verb, "config": resolved.config.model_dump(), "origins": resolved.origins}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            env = self._environment(count, listener, json.dumps(job))
            self.processes = [self._start(env, rank, listener) for rank in range(count)]

    def run(self) -> int:
        """Wait for all; returns the exit code. One that fails takes the others with it, unless these can spare it."""
        previous = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
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
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._verdict()

    def _environment(self, count: int, listener: socket.socket, job: str) -> dict[str, str]:
        threads = str(self.config.train.threads)
        given = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            JOB: job,
            ERRORS: str(self.errors),
        }
        if sys.platform == "linux":
            given["GLOO_SOCKET_IFNAME"] = "lo"  # else the interface that the host's name resolves to
        return {**MEMORY, **os.environ, **given}

    def _start(self, env: dict[str, str], rank: int, listener: socket.socket) -> subprocess.Popen[bytes]:
        env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        inherited: tuple[int, ...] = ()
        if rank == 0:
            env[STORE_FD] = str(listener.fileno())
            inherited = (listener.fileno(),)
        command = [sys.executable, "-m", "shoal.engines.worker"]
        # A session of its own keeps Ctrl-C from the workers: it comes through `_pass_on` as a wish to stop.
        return subprocess.Popen(command, env=env, pass_fds=inherited, start_new_session=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the workers to save and leave; asked a second time, kill them."""
        self.signals += 1
        self.interrupted = self.interrupted or number == signal.SIGINT or self.signals > 1
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

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

    def _verdict(self) -> int:
        """The exit code of the whole, after the root cause was raised or printed."""
        codes = [p.returncode for p in self.processes]
        if not any(code for rank, code in enumerate(codes) if rank not in self.spared):
            return DONE
        records = [json.loads(path.read_text()) for path in self.errors.glob("rank-*.json")]
        if self.interrupted:
            _say(records, "interrupted")
            return INTERRUPTED
        own = {rank: p.returncode for rank, p in enumerate(self.processes) if p.pid not in self.stuck}
        orderly = all(own[r] in (DONE, PREEMPTED) for r in own.keys() - self.spared)
        too_early = -signal.SIGTERM in own.values()  # a worker that had nothing to save; others may miss it
        if orderly or too_early:
            left = [record for record in records if record["exit_code"] == PREEMPTED]
            _say(left, "stopped before the first step: there was nothing to save yet")
            return PREEMPTED
        failed = [r for r in records if r["exit_code"] != PREEMPTED]  # the others leave while rank 0 saves
        refused = [r for r in failed if not r["traceback"]]
        silent = [rank for rank, code in own.items() if code < 0]
        if silent and not refused:
            raise ShoalError(
                f"worker {silent[0]} was killed by {signal.Signals(-codes[silent[0]]).name}; if the machine ran out "
                f"of memory lower --per-device-train-batch-size; go on with --resume-from-checkpoint latest"
            )
        if not failed:
            rank, code = next((rank, code) for rank, code in own.items() if code not in (DONE, PREEMPTED))
            raise ShoalError(f"worker {rank} ended with exit code {code} and left no message")
        return self._tell(min(refused or failed, key=lambda r: r["time"]))

    def _tell(self, root: dict[str, Any]) -> int:
        """Print the root cause, its traceback first where it is no refusal, and keep a copy in the run's folder."""
        where = ""
        if root["traceback"]:
            print(root["traceback"], file=sys.stderr)
            where = f" (worker {root['rank']}; its traceback is above)"
            folder = Path(self.config.checkpoint.output_dir)
            if folder.is_dir():
                (folder / "errors").mkdir(exist_ok=True)
                (folder / "errors" / f"rank-{root['rank']}.json").write_text(json.dumps(root, indent=1))
        print(f"shoal: error: {root['message']}{where}", file=sys.stderr)
        return int(root["exit_code"]) or FAILED


def _say(records: list[dict[str, Any]], otherwise: str) -> None:
    message = min(records, key=lambda r: r["time"])["message"] if records else otherwise
    print(f"shoal: {message}", file=sys.stderr)
