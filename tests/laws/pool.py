"""Real processes for the laws, without waiting for torch each time.

One process imports what a worker imports, once a session, and forks the ranks of every world from itself. A rank
that dies in one test is thus not missing in the next: each world is made of fresh processes and a fresh mesh.
(Results come back by pickle over files of our own: in tests nobody else writes them.)
"""

import ctypes
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HANG = 60.0  # seconds after which a world that has not ended counts as hung
TESTS = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1


class Hang(AssertionError):
    """Some process of a world did not end."""


@dataclass
class Outcome:
    """How one process ended: its exit code (negative: the signal), and what it returned or raised."""

    code: int
    value: Any = None
    error: str = ""
    trace: str = ""
    output: str = ""


@dataclass
class Started:
    """A process that runs."""

    pool: "Pool"
    pid: int
    result: Path

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = HANG) -> Outcome:
        """How it ended. Raises Hang if it does not."""
        return self.pool.wait([self], seconds)[0]

    def output(self) -> str:
        """What it has printed so far."""
        file = self.result.with_suffix(".out")
        return file.read_text() if file.exists() else ""  # it makes the file itself


class Pool:
    """The process from which ranks are forked, and how to ask it for some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = itertools.count()
        ours, its = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as of a worker, which reads it when torch is imported
        code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from laws import pool; pool.serve({its.fileno()})"
        self.process = subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=[its.fileno()])
        its.close()
        self.link = Connection(ours.detach())

    def close(self) -> None:
        """End the process; whatever it started ends with it."""
        self.link.close()
        self.process.wait()

    def start(self, function: Callable[..., Any], *args: Any, ranks: int = 0, **kwargs: Any) -> list[Started]:
        """Start a world of `ranks` processes that call `function(mesh, ...)`; 0: one, without mesh."""
        folder = self.folder / f"{next(self.names):04d}-{function.__name__}"
        folder.mkdir()
        work = pickle.dumps((function, args, kwargs))
        self.link.send(("start", folder, ranks, sys.path, work))
        pids = self.link.recv()
        return [Started(self, pid, folder / f"{rank}.pickle") for rank, pid in enumerate(pids)]

    def wait(self, started: list[Started], seconds: float = HANG) -> list[Outcome]:
        """How each of them ended. Raises Hang, and kills those that are left, if some do not."""
        self.link.send(("wait", [each.pid for each in started], seconds))
        codes = self.link.recv()
        outcomes = []
        for each in started:
            written = pickle.loads(each.result.read_bytes()) if each.result.exists() else {}
            outcomes.append(Outcome(codes[each.pid] or 0, output=each.output(), **written))
        if None in codes.values():
            left = [rank for rank, each in enumerate(started) if codes[each.pid] is None]
            raise Hang(f"ranks {left} still ran after {seconds} s; all said: {outcomes}")
        return outcomes

    def world(self, ranks: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `function(mesh, ...)` returned on each rank. Fails where one raised or died."""
        outcomes = self.wait(self.start(function, *args, ranks=ranks, **kwargs))
        bad = [
            f"rank {r} of {ranks}: exit {o.code}\n{o.trace}{o.output}"
            for r, o in enumerate(outcomes)
            if o.code
        ]
        assert not bad, "\n".join(bad)
        return [outcome.value for outcome in outcomes]

    def alone(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """How one process that called `function(...)`, without a mesh, ended."""
        return self.start(function, *args, **kwargs)[0].wait()


def serve(link_fd: int) -> None:
    """Fork and wait as asked, until the other end closes."""
    import numpy as np
    import pytest  # noqa: F401  (test modules import it)
    import torch
    import torch.distributed.pipelining
    from laws import models  # noqa: F401  (those of transformers take seconds)

    import shoal.cli
    import shoal.config
    import shoal.engines.local
    import shoal.engines.worker
    import shoal.tasks
    import shoal.training.jobs
    from shoal.wire import meeting

    meeting.PARTING = 2.0  # worlds of which a rank has died wait so long
    torch.set_num_threads(1)
    shoal.config.load_config(None, [], {})  # builds pydantic's validators
    np.unique([0])  # imports numpy.ma
    link = Connection(link_fd)
    while True:
        try:
            request = link.recv()
        except (EOFError, OSError):
            return
        if request[0] == "start":
            link.send(_fork_world(link, *request[1:]))
        else:
            link.send(_reap(*request[1:]))


def _fork_world(link: Connection, folder: Path, ranks: int, path: list[str], work: bytes) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pids = []
        for rank in range(max(1, ranks)):
            pid = os.fork()
            if pid == 0:
                link.close()
                sys.path[:] = path
                fd = os.dup(listener.fileno()) if rank == 0 and ranks else None
                listener_port = listener.getsockname()[1]
                listener.close()
                os._exit(_run(folder / f"{rank}.pickle", rank, ranks, listener_port, fd, work))
            pids.append(pid)
    return pids


def _run(result: Path, rank: int, ranks: int, port: int, store_fd: int | None, work: bytes) -> int:
    """Call the function as rank `rank`, and write what came of it."""
    from shoal.wire.mesh import join
    from shoal.wire.rendezvous import Rendezvous

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _redirect(result.with_suffix(".out"))
    code, written = 0, {}
    try:
        function, args, kwargs = pickle.loads(work)
        if ranks:
            with join(Rendezvous(rank, ranks, port=port, store_fd=store_fd), "cpu") as mesh:
                written["value"] = function(mesh, *args, **kwargs)
        else:
            written["value"] = function(*args, **kwargs)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException as error:
        code = 1
        written = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    aside = result.with_suffix(".tmp")
    aside.write_bytes(pickle.dumps(written))
    aside.rename(result)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _redirect(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _reap(pids: list[int], seconds: float) -> dict[int, int | None]:
    """The exit codes, None for those that had to be killed."""
    deadline = time.monotonic() + seconds
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[pid] = None
    return codes
