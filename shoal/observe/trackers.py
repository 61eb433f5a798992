"""Where the numbers of a run are written, unsmoothed and unfiltered."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from shoal.errors import described, naming
from shoal.system.run_folder import OWN


class MetricsFile:
    """`metrics.jsonl`. A resumed run goes on behind the step it resumes from; later lines are dropped."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        aside = path.parent / OWN / f"{path.name}.tmp"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_step]
        with naming(path):
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text("".join(kept))
        aside.replace(path)
        self._file: IO[str] = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. A number that is not finite is written as JSON has it in Python: NaN, Infinity."""
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        with naming(self.path), self._file:
            os.fsync(self._file.fileno())


class TensorBoard:
    """The same numbers for TensorBoard, as long as that works: a run is never lost for a picture of it.

    It is imported only when asked for, since that costs seconds. Only its first failure is reported, to `say`.
    """

    def __init__(self, folder: Path, run: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._writer: Any = None
        with self._going_on():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), filename_suffix=f".{run}")

    def write(self, record: dict[str, Any]) -> None:
        """Every number of the record but the step, as a scalar at its step."""
        with self._going_on():
            for name, value in record.items():
                if self._writer is not None and name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Have all of it on disk."""
        with self._going_on():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer = None
            self._say(f"nothing more is written for TensorBoard: {described(error)}")


class Tracker(Protocol):
    """Where the records of a run go."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record: "step", and numbers or lists of numbers by metric name."""
        ...

    def close(self) -> None:
        """The run ends: flush everything."""
        ...


# Name for --report-to -> (folder of the run, id of the run, where to say that it failed) -> tracker
TRACKERS: dict[str, Callable[[Path, str, Callable[[str], None]], Tracker]] = {
    "tensorboard": lambda folder, run, say: TensorBoard(folder / "tb", run, say),
}


def trackers(
    names: list[str], folder: Path, resumed_step: int, run: str, say: Callable[[str], None]
) -> list[Tracker]:
    """`metrics.jsonl`, and the trackers of these names."""
    metrics: list[Tracker] = [MetricsFile(folder / "metrics.jsonl", resumed_step)]
    return metrics + [TRACKERS[name](folder, run, say) for name in names]


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may end in half a line, as after a kill."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
