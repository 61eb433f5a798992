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
from typing import Any, NoReturn

from shoal.config import Resolved, RunConfig
from shoal.config.layout import STAGES
from shoal.engines.signals import Stop, hear
from shoal.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    Preempted,
    ShoalError,
    UserError,
    WorkerLost,
    choose,
    described,
    foreseen,
)
from shoal.system import output
from shoal.system.run_folder import to_go_on

ERRORS = "SHOAL_ERRORS"  # names the folder in which a worker leaves its error for the launcher
JOB = "job.json"  # there: the verb and the configuration
FOUND = "found.json"  # there: what rank 0 found
AT_ONCE = 128 + signal.SIGTERM  # the exit code of one that was asked to stop, and left the others alone


class Launched(Stop):
    """The wish to stop of a worker that our launcher has started: it hears what happened, and says it."""

    def __init__(self) -> None:
        super().__init__(self._report_and_leave)

    def hold(self, tell: Callable[[], None], stuck: Callable[[], str] = str) -> None:
        """From now on there is something to save, and the launcher hears of it."""
        super().hold(tell, stuck)
        Path(os.environ[ERRORS], began(int(os.environ["RANK"]))).touch()

    @staticmethod
    def _report_and_leave(error: ShoalError | KeyboardInterrupt) -> NoReturn:
        assert isinstance(error, ShoalError)  # Ctrl-C comes as SIGTERM
        _report(error, error)
        leave(AT_ONCE if isinstance(error, Preempted) else error.exit_code)


def began(rank: int) -> str:
    """The file among the errors by which a worker says that it trains."""
    return f"began-{rank}"


def work(verb: str, resolved: Resolved, stop: Stop) -> Any:
    """Do this rank's part of `verb`, "train" or "evaluate", and return what it found.

    Raises WorkerLost where another rank is gone that this one needs.
    """
    from shoal.engines.joining import joined, worker_lost
    from shoal.sync import SYNCS
    from shoal.tasks import TASKS
    from shoal.training.jobs import JOBS

    config = resolved.config
    choose("--strategy", config.strategy.name, {**SYNCS, **STAGES})  # before the work of preparing
    data = choose("--task", config.train.task, TASKS).prepare(config, False)
    with joined(config, data.name) as mesh:
        if mesh.pulse and config.strategy.traits.spares == "none":
            mesh.pulse.give_up = lambda lost: stop.end(worker_lost(lost, config))
        found = JOBS[verb](resolved, mesh, data, stop)
        hear(signal.SIGTERM, signal.SIG_IGN)  # all is done: there is nothing left to stop
    return found


def main() -> int:
    """Take the job from the launcher's folder, do it, and leave an error where the launcher finds it."""
    from shoal.engines.orphans import die_with_parent

    die_with_parent()
    output.forgive()
    folder = ""
    try:
        job = json.loads(Path(os.environ[ERRORS], JOB).read_text())
        config = RunConfig.model_validate(job["config"])
        folder = config.checkpoint.output_dir
        found = work(job["verb"], Resolved(config, job["origins"]), Launched())
        if found is not None:
            Path(os.environ[ERRORS], FOUND).write_text(json.dumps(found))
    except Exception as error:
        line = foreseen(error, folder, to_go_on(Path(folder)))
        _report(error, line)
        return line.exit_code if line else FAILED
    return DONE


def _report(error: ShoalError | Exception, line: ShoalError | None) -> None:
    """Write an error to a file for the launcher: one line, or with a traceback if it was not foreseen."""
    trace = "" if line else traceback.format_exc()
    record = {
        "rank": int(os.environ["RANK"]),
        "time": time.time(),
        "message": str(line) if line else described(error),
        "refusal": [line.asked, line.found, line.change] if isinstance(line, UserError) else [],
        "exit_code": line.exit_code if line else FAILED,
        "traceback": trace,
        "lost": isinstance(line, WorkerLost),
    }
    try:
        file = Path(os.environ[ERRORS], f"rank-{record['rank']}.json")
        aside = file.with_suffix(".tmp")  # the launcher, which may kill this worker now, reads no half of it
        aside.write_text(json.dumps(record, indent=1))
        aside.replace(file)
    except OSError:  # the disk of temporary files is full, too
        output.say(f"{trace}shoal: error: {record['message']}")


def end(error: ShoalError | KeyboardInterrupt) -> NoReturn:
    """End a worker of another engine at once, with the line of this error."""
    from shoal.engines.environment import speaks

    if speaks():
        output.say(f"shoal: {str(error) or 'interrupted'}")
    leave(error.exit_code if isinstance(error, ShoalError) else INTERRUPTED)


def leave(code: int) -> NoReturn:
    """End this worker at once: on the interpreter's own way out a thread that is within C++ would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
