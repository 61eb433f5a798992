"""`shoal` as a user starts it, with faults at a chosen (rank, step, phase).

The launcher and its workers are processes as ever, but forked from the pool instead of started anew: a worker then
is there at once, where Python would need seconds to import torch. Other tests start it for real.
"""

import atexit
import ctypes
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

import torch
from laws.pool import PR_SET_PDEATHSIG

MODEL = [
    "--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2",
    "--model.intermediate-size", "32", "--vocab-size", "300", "--sequence-length", "16",
]  # fmt: skip
BATCH = ["--global-batch-size", "8", "--per-device-train-batch-size", "2", "--learning-rate", "0.01"]


@dataclass(frozen=True)
class Fault:
    """What happens to rank `rank` when it comes to `phase` of step `step` (from 0)."""

    kind: str  # "kill", "raise", "nan", "sigterm"
    rank: int
    step: int
    phase: str  # one of PHASES


PHASES = ("forward", "backward", "exchange", "update", "observe", "save")


def shoal(words: list[str], fault: Fault | None = None) -> None:
    """The command line, in a process of its own; ends it with the exit code."""
    from shoal import cli
    from shoal.engines import local

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)  # it is on its own, as under a shell
    started = lambda *args, **kwargs: Forked(*args, fault=fault, **kwargs)  # noqa: E731
    local.subprocess = SimpleNamespace(Popen=started, TimeoutExpired=subprocess.TimeoutExpired)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(words))


class Forked:
    """What the launcher uses of `subprocess.Popen`, by fork alone."""

    def __init__(
        self, command: list[str], env: dict[str, str], pass_fds: tuple[int, ...], start_new_session: bool,
        fault: Fault | None,
    ) -> None:  # fmt: skip
        assert command == [sys.executable, "-m", "shoal.engines.worker"]
        assert start_new_session
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_work(env, pass_fds, fault))

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
    from shoal import checkpoint
    from shoal.observe.observer import Observer
    from shoal.replica import Replica
    from shoal.sync import SYNCS, allreduce

    now = SimpleNamespace(step=-1, done=False)

    def strike(replica: Any = None, step: int | None = None) -> None:
        if (now.step if step is None else step) != fault.step or now.done:
            return
        now.done = True
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "raise":
            raise RuntimeError(f"the fault of {fault}")
        elif fault.kind == "nan":
            replica.buckets.all[-1].flat[0] = float("nan")

    def before(owner: Any, name: str, then: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            then(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, struck)

    def begin(replica: Replica, batch: Any) -> None:
        now.step = batch.step
        if fault.phase == "forward":
            strike(replica)
        if fault.phase == "backward":
            model = replica.model
            handles = [p.register_hook(lambda grad: strike_in_backward(replica, grad)) for p in model.parameters()]
            now.handles = handles

    def strike_in_backward(replica: Replica, grad: torch.Tensor) -> torch.Tensor:
        if fault.kind == "nan" and now.step == fault.step:
            return grad * float("nan")
        strike(replica)
        return grad

    def at(phase: str) -> Callable[..., None]:
        return lambda *args, **kwargs: strike() if fault.phase == phase else None

    def save(folder: Path, *args: Any) -> None:  # in a thread, while the loop is at a later step
        if fault.phase == "save":
            strike(step=int(folder.name.removeprefix("checkpoint-")) - 1)

    before(Replica, "gradients", begin)
    before(allreduce.AllReduce, "step", at("exchange"))
    before(Replica, "update", at("update"))
    before(Observer, "step", at("observe"))
    before(checkpoint, "write", save)
    assert fault.phase in PHASES
    assert SYNCS


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
