"""The sample ledger: which rank computed which sample, and the proof that each was used exactly once.

ledger/run.json              the number of samples, and where the ledger begins: step and position
ledger/rank-00000.jsonl      a line a step: attempt, step, its position and rows, first micro-batch, sample ids
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from shoal.data.batches import ABSENT, Batch, Batches
from shoal.errors import UserError, naming
from shoal.system.run_folder import ledger_file

FACTS = "run.json"


class Ledger:
    """One rank's lines. `attempt` rises with every start of the run, so that a step done again replaces itself."""

    def __init__(self, folder: Path, rank: int, attempt: int, batches: Batches) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and not (folder / FACTS).exists():
            begins = {"step": batches.first_step, "position": batches.first_position}
            (folder / FACTS).write_text(json.dumps({"samples": len(batches.samples), **begins}))
        self.attempt = attempt
        self.path = path = folder / ledger_file(rank)
        broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file: IO[str] = path.open("a")
        if broken:  # a kill left half a line
            self._file.write("\n")

    def write(self, batch: Batch, share: range) -> None:
        """Record that this rank computed the micro-batches `share` of `batch`."""
        samples = batch.ids[share.start : share.stop].reshape(-1).tolist()
        of_step = {"step": batch.step, "position": batch.position, "rows": batch.ids.size}
        line = {"attempt": self.attempt, **of_step, "first": share.start, "samples": samples}
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


@dataclass(frozen=True)
class Audit:
    """What a ledger proves. `faults` is empty if every sample was used exactly once in every whole epoch.

    `first` is the position at which it begins: 0, unless the run began from a checkpoint of another one.
    """

    samples: int
    first: int
    steps: int
    whole_epochs: int
    used: int
    ranks: int
    faults: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.faults

    def __str__(self) -> str:
        rest = self.used - self.whole_epochs * self.samples
        begun = f" from sample {self.first:,} on" if self.first else ""
        others = "of others" if self.first else "of the next"
        found = (
            f"{self.steps:,} steps on {self.ranks} ranks{begun} used {self.used:,} samples: "
            f"{self.whole_epochs} whole epochs of {self.samples:,}, and {rest:,} {others}"
        )
        verdict = "each sample was used exactly once" if self.ok else "\n".join(self.faults[:20])
        return f"{found}\n{verdict}"


@dataclass
class Step:
    """What was recorded of a step by its last attempt. `rows` and `position` are None in ledgers of old."""

    rows: int | None = None
    position: int | None = None
    parts: list[tuple[int, list[int]]] = field(default_factory=list)  # first micro-batch, sample ids

    @property
    def ids(self) -> list[int]:
        """The samples in the order of its rows."""
        return [i for _, part in sorted(self.parts) for i in part]


def audit(run: Path) -> Audit:
    """Read the ledger of a run folder and check it. Raises UserError if there is none."""
    if not run.is_dir():
        raise UserError(f"audit {run}", "there is no such folder", "give a run's folder")
    folder = run / "ledger"
    if not (folder / FACTS).exists():
        raise UserError(f"audit {run}", "it holds no ledger", "train with --ledger")
    facts = json.loads((folder / FACTS).read_text())
    samples, first = facts["samples"], facts.get("position", 0)
    files = sorted(folder.glob("rank-*.jsonl"))
    steps = _final_attempts(files)
    begin = facts.get("step", 0)
    faults = [f"step {s} is missing" for s in range(begin, max(steps, default=-1) + 1) if s not in steps]
    used: list[int] = []
    for number in sorted(steps):
        step = steps[number]
        faults += _step_faults(number, step, facts.get("rows", 0), first + len(used))
        used += [i for i in step.ids if i != ABSENT]
    ids, whole = np.array(used, dtype=np.int64), 0
    for epoch in range(first // samples, -(-(first + len(used)) // samples)):
        begun, ended = (np.clip(epoch * samples + size - first, 0, None) for size in (0, samples))
        part = ids[begun:ended]
        whole += len(part) == samples
        faults += _epoch_faults(epoch, part, samples)
    return Audit(samples, first, len(steps), whole, len(used), len(files), faults)


def _final_attempts(files: list[Path]) -> dict[int, Step]:
    """For each step what its last attempt computed. An attempt takes back all later steps of those before it."""
    attempts: dict[int, dict[int, Step]] = {}
    for path in files:
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # half a line, of a killed attempt that was done again
            steps = attempts.setdefault(line["attempt"], {})
            step = steps.setdefault(line["step"], Step(line.get("rows"), line.get("position")))
            step.parts.append((line["first"], line["samples"]))
    final: dict[int, Step] = {}
    for _, steps in sorted(attempts.items()):
        final = {number: step for number, step in final.items() if number < min(steps)} | steps
    return final


def _step_faults(number: int, step: Step, rows: int, position: int) -> list[str]:
    """`rows` are those of a ledger of old; `position` is where the step before it ended."""
    expected, found = step.rows or rows, len(step.ids)
    faults = [f"step {number}: {found} of {expected} rows are recorded"] if found != expected else []
    if step.position not in (None, position):
        faults.append(
            f"step {number}: it begins at sample {step.position}, and the one before ended at {position}"
        )
    return faults


def _epoch_faults(epoch: int, ids: np.ndarray, samples: int) -> list[str]:
    counts = np.bincount(ids, minlength=samples)
    faults = [f"epoch {epoch}: sample {i} was used {counts[i]} times" for i in np.flatnonzero(counts > 1)]
    if len(ids) == samples:
        faults += [f"epoch {epoch}: sample {i} was never used" for i in np.flatnonzero(counts == 0)]
    return faults
