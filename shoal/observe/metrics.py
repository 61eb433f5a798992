"""The numbers of a run, as they are: one JSON object a line, never smoothed or filtered."""

import json
import os
from pathlib import Path
from typing import IO, Any

from shoal.runfolder import OWN


class MetricsFile:
    """`metrics.jsonl`. A resumed run goes on behind the step it resumes from; later lines are dropped."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        aside = path.parent / OWN / f"{path.name}.tmp"
        aside.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_step]
        aside.write_text("".join(kept))
        aside.replace(path)
        self._file: IO[str] = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. A number that is not finite is written as JSON has it in Python: NaN, Infinity."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Have all of it on disk."""
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoard:
    """The same numbers for TensorBoard; imported only when asked for, since it costs seconds."""

    def __init__(self, folder: Path, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), filename_suffix=f".{run}")

    def write(self, record: dict[str, Any]) -> None:
        """Every number of the record but the step, as a scalar at its step."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Have all of it on disk."""
        self._writer.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may end in half a line, as after a kill."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
