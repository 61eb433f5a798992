"""One worker: `python -m shoal.engines.worker`, started by the local launcher or called under any other engine.

What is heavy is imported inside functions, so that helper processes that import this module as their main one
stay light.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shoal.config import Resolved, RunConfig
from shoal.config.layout import STAGES
from shoal.errors import DONE, FAILED, ShoalError, choose

JOB = "SHOAL_JOB"  # the verb and the configuration, as JSON
ERRORS = "SHOAL_ERRORS"  # the folder in which a worker leaves its error for the launcher


def began(rank: int) -> str:
    """The file among the errors by which a worker says that it trains."""
    return f"began-{rank}"


class Stop:
    """SIGTERM: before training it ends the worker at once, in whatever call; after `hold` it only sets a flag."""

    def __init__(self) -> None:
        self.asked = False

    def hold(self, tell: Callable[[], None]) -> None:
        """From now on there is something to save, and the launcher hears of it. `tell` is called at SIGTERM."""
        self._tell = tell
        signal.signal(signal.SIGTERM, self._receive)
        if ERRORS in os.environ:
            Path(os.environ[ERRORS], began(int(os.environ["RANK"]))).touch()

    def __call__(self) -> bool:
        """Whether the run was asked to stop."""
        return self.asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._tell()


def work(verb: str, resolved: Resolved) -> None:
    """Do this rank's part of `verb`: "train" or "evaluate"."""
    stop = Stop()
    from shoal.engines.environment import placement
    from shoal.job import JOBS
    from shoal.mesh import join
    from shoal.sync import SYNCS
    from shoal.tasks import TASKS

    config = resolved.config
    choose("--strategy", config.strategy.name, {**SYNCS, **STAGES})  # before the work of preparing
    data = choose("--task", config.train.task, TASKS).prepare(config)
    with join(placement()) as mesh:
        JOBS[verb](resolved, mesh, data, stop)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done: there is nothing left to stop


def main() -> int:
    """Take the job from the environment, do it, and leave an error where the launcher finds it."""
    from shoal.engines.orphans import die_with_parent

    die_with_parent()
    try:
        job = json.loads(os.environ[JOB])
        work(job["verb"], Resolved(RunConfig.model_validate(job["config"]), job["origins"]))
    except ShoalError as error:
        _leave(str(error), error.exit_code)
        return error.exit_code
    except Exception as error:
        trace = traceback.format_exc()
        _leave(f"{type(error).__name__}: {error}".strip().splitlines()[0], FAILED, trace)
        return FAILED
    return DONE


def _leave(message: str, exit_code: int, trace: str = "") -> None:
    record = {
        "rank": int(os.environ["RANK"]),
        "time": time.time(),
        "message": message,
        "exit_code": exit_code,
        "traceback": trace,
    }
    Path(os.environ[ERRORS], f"rank-{record['rank']}.json").write_text(json.dumps(record, indent=1))


def leave(code: int) -> NoReturn:
    """End this worker at once: on the interpreter's own way out a thread that is within C++ would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
