"""`shoal` as a user starts it, with faults at a chosen (rank, step, phase).

The launcher and its workers are processes as ever, but forked from the pool instead of started anew: a worker then
is there at once, where Python would need seconds to import torch. Other tests start it for real.
"""

import atexit
import ctypes
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from laws.pool import PR_SET_PDEATHSIG
from laws.strategies import STRATEGIES
from safetensors.numpy import load_file

from shoal.system import helpers

MODEL = [
    "--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2",
    "--model.intermediate-size", "32", "--vocab-size", "300", "--sequence-length", "16",
]  # fmt: skip
BATCH = ["--global-batch-size", "8", "--per-device-train-batch-size", "2", "--learning-rate", "0.01"]


@dataclass(frozen=True)
class Fault:
    """What happens to rank `rank` when it comes to `phase` of step `step` (from 0; -1 for what is before)."""

    kind: str  # one of KINDS
    rank: int
    step: int
    phase: str  # one of PHASES
    to: str = (
        "worker"  # whom SIGTERM reaches: "worker" `rank` alone, "launcher", which passes it on, or its "peer"
    )
    steps: int = 1  # NaN: in so many steps in a row


KINDS = ("kill", "raise", "sigterm", "full disk", "nan")  # NaN comes in the backward pass
PHASES = (
    "join", "start", "forward", "backward", "exchange", "update", "observe", "save", "evaluate",
    "measure",  # in an evaluation, before the second micro-batch of this rank
    "finish",  # where a worker of servers waits for the others
    "export",
)  # fmt: skip


def shoal(words: list[str], fault: Fault | None = None) -> None:
    """The command line, in a process of its own; ends it with the exit code."""
    from shoal import cli

    fork_workers(fault)
    sys.exit(cli.main(words))


def shoal_train(settings: dict[str, Any]) -> dict[str, Any]:
    """`shoal.train`, in a process of its own."""
    from shoal import api

    fork_workers(None)
    return api.train(**settings)


def shoal_evaluate(folder: str, settings: dict[str, Any]) -> dict[str, float]:
    """`shoal.evaluate`, in a process of its own."""
    from shoal import api

    fork_workers(None)
    return api.evaluate(folder, **settings)


def fork_workers(fault: Fault | None) -> None:
    """Have this process launch workers by fork."""
    from shoal.engines import local

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)  # it is on its own, as under a shell
    started = lambda *args, **kwargs: Forked(*args, fault=fault, **kwargs)  # noqa: E731
    local.subprocess = SimpleNamespace(Popen=started, TimeoutExpired=subprocess.TimeoutExpired)
    local.GRACE = 3.0
    os.environ.pop("GLOO_SOCKET_IFNAME")  # the pool's own: the launcher sets it
    os.environ["SHOAL_DEVICE"] = "cpu"  # whatever the machine has
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Forked:
    """What the launcher uses of `subprocess.Popen`, by fork alone."""

    def __init__(
        self, command: list[str], env: dict[str, str], pass_fds: tuple[int, ...], start_new_session: bool,
        fault: Fault | None,
    ) -> None:  # fmt: skip
        assert command == helpers.command("shoal.engines.worker")
        assert start_new_session
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the worker's own handlers would be the launcher's.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_work(env, pass_fds, fault))
        signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _work(env: dict[str, str], pass_fds: tuple[int, ...], fault: Fault | None) -> int:
    """What a new process would do for `python -m shoal.engines.worker`."""
    os.setsid()
    atexit._clear()  # what the launcher does at its end
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    os.environ.clear()
    os.environ.update(env)
    first = 3
    for fd in (*sorted(pass_fds), os.sysconf("SC_OPEN_MAX")):
        os.closerange(first, min(fd, 65536))
        first = fd + 1
    from shoal.engines import worker

    code = 1
    try:
        if fault is not None and fault.rank == int(env["RANK"]):
            insert(fault)
        code = worker.main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for threads, as the interpreter does at its end
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def insert(fault: Fault) -> None:
    """Have this process meet `fault`."""
    from shoal.checkpoint import saving
    from shoal.engines.worker import Stop
    from shoal.replica import Replica
    from shoal.servers.client import ServerClient
    from shoal.sync import SYNCS
    from shoal.sync.server_strategy import ServerStrategy
    from shoal.tasks.causal_lm import CausalSurroundings
    from shoal.training import evaluate as evaluation
    from shoal.training import jobs, loop
    from shoal.training.recorder import Recorder
    from shoal.wire import meeting

    assert fault.kind in KINDS
    assert fault.phase in PHASES
    at = SimpleNamespace(step=-1, struck=False, heard=False)

    def meet(phase: str, step: int | None = None) -> None:
        if phase != fault.phase or fault.step != (at.step if step is None else step) or at.struck:
            return
        at.struck = True
        if fault.kind == "raise":
            raise RuntimeError(f"the fault in {phase}")
        if fault.kind == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        launcher = os.getppid()
        (peer,) = {*workers_of(launcher)} - {os.getpid()} if fault.to == "peer" else {0}
        os.kill({"worker": os.getpid(), "launcher": launcher, "peer": peer}[fault.to], signal.SIGTERM)
        while fault.to == "launcher" and not at.heard:  # it has come when this rank goes on
            time.sleep(0.001)

    def before(owner: Any, name: str, then: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def both(*args: Any, **kwargs: Any) -> Any:
            then(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, both)

    def forward(replica: Replica, batch: Any) -> None:
        first = at.step < 0
        at.step = batch.step
        if first:
            for p in replica.model.parameters():
                p.register_hook(backward)
        meet("forward")

    def backward(grad: torch.Tensor) -> torch.Tensor:
        if fault.kind == "nan":
            return grad * float("nan") if 0 <= at.step - fault.step < fault.steps else grad
        meet("backward")
        return grad

    before(meeting, "open_store", lambda *args: meet("join"))
    before(Replica, "gradients", forward)
    for sync in SYNCS.values():
        before(sync, "step", lambda *args: meet("exchange"))
    before(Replica, "update", lambda *args: meet("update"))
    before(ServerClient, "load", lambda *args: meet("update"))
    before(Recorder, "step", lambda *args: meet("observe"))
    before(loop, "validate", lambda *args: meet("evaluate"))
    before(jobs, "evaluate_model", lambda *args: meet("evaluate"))
    before(Stop, "hold", lambda *args: meet("start"))
    before(Stop, "_receive", lambda *args: setattr(at, "heard", True))
    before(ServerStrategy, "_leave", lambda *args: meet("finish"))
    evaluation.evaluate = counting(evaluation.evaluate, lambda turn: turn == 1 and meet("measure"))
    before(CausalSurroundings, "export", lambda *args: meet("export"))
    before(
        saving, "write",  # in a thread, while the loop is at a later step
        lambda folder, *args, **kwargs: meet("save", int(folder.name.removeprefix("checkpoint-")) - 1),
    )  # fmt: skip


def counting(evaluate: Callable[..., Any], then: Callable[[int], Any]) -> Callable[..., Any]:
    """`evaluate`, with `then` called before each micro-batch that it measures, with its number on this rank."""

    def counted(model: Any, loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turns = itertools.count()

        def measured(*inputs: Any) -> Any:
            then(next(turns))
            return loss(*inputs)

        return evaluate(model, measured, *args, **kwargs)

    return counted


def workers_of(launcher: int) -> list[int]:
    """The processes whose parent is `launcher`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == launcher:
            found.append(int(entry.parent.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether the process still runs (one that waits to be reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def flags(strategy: str) -> list[str]:
    """The flags that ask for a strategy of the table."""
    return [f"--{key}={value}" for key, value in STRATEGIES[strategy].settings.items()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of each step."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def losses_of(run: Path) -> list[float]:
    """The loss of each step, as written."""
    return [record["train/loss"] for record in steps_of(run)]


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """The exported model."""
    return load_file(run / "final" / "model.safetensors")


def ledger_of(run: Path) -> dict[int, list[int]]:
    """The samples of each step in the order of its micro-batches, by the last attempt at it; read on its own."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for file in (run / "ledger").glob("rank-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            lines.setdefault(line["step"], []).append(line)
    last = {step: max(line["attempt"] for line in found) for step, found in lines.items()}
    kept = {step: [e for e in lines[step] if e["attempt"] == last[step]] for step in sorted(lines)}
    return {
        step: [sample for line in sorted(found, key=lambda e: e["first"]) for sample in line["samples"]]
        for step, found in kept.items()
    }
