"""Tasks: rows -> samples -> micro-batch -> summed loss and label count -> metrics and predictions.

A task is one file here and one row of `TASKS`. The loop, the batches and the evaluation know no task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.config import RunConfig
from shoal.tasks import causal_lm
from shoal.tasks.base import Task, predicts
from shoal.tasks.surroundings import Surroundings

__all__ = ["TASKS", "Entry", "Surroundings", "Task", "predicts"]


@dataclass(frozen=True)
class Entry:
    """What `--task` names."""

    # (configuration, whether to say what is in the data) -> the folder of prepared data: before any worker starts
    prepare: Callable[[RunConfig, bool], Path]
    task: Callable[[RunConfig, Path], Task]
    surroundings: Callable[[RunConfig, Path], Surroundings] = Surroundings


TASKS: dict[str, Entry] = {
    "causal-lm": Entry(causal_lm.prepare_text, causal_lm.CausalLM, causal_lm.CausalSurroundings),
}
