"""The sample ledger: which rank computed which sample, and the proof that each was used exactly once.

ledger/run.json              the number of samples and of rows in a step, and where the data ends
ledger/rank-00000.jsonl      a line a step: attempt, step, first micro-batch, sample ids
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from shoal.data.batches import ABSENT, Batch, Batches
from shoal.errors import UserError, naming


class Ledger:
    """One rank's lines. `attempt` rises with every start of the run, so that a step done again replaces itself."""

    def __init__(self, folder: Path, rank: int, attempt: int, batches: Batches) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            facts = {"samples": len(batches.samples), "rows": batches.global_batch_size, "end": batches.end}
            (folder / "run.json").write_text(json.dumps(facts))
        self.attempt = attempt
        self.path = path = folder / f"rank-{rank:05d}.jsonl"
        broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file: IO[str] = path.open("a")
        if broken:  # a kill left half a line
            self._file.write("\n")

    def write(self, batch: Batch, share: range) -> None:
        """Record that this rank computed the micro-batches `share` of `batch`."""
        samples = batch.ids[share.start : share.stop].reshape(-1).tolist()
        line = {"attempt": self.attempt, "step": batch.step, "first": share.start, "samples": samples}
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


@dataclass(frozen=True)
class Audit:
    """What a ledger proves. `faults` is empty if every sample was used exactly once in every whole epoch."""

    samples: int
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
        found = (
            f"{self.steps:,} steps on {self.ranks} ranks used {self.used:,} samples: "
            f"{self.whole_epochs} whole epochs of {self.samples:,}, and {rest:,} of the next"
        )
        verdict = "each sample was used exactly once" if self.ok else "\n".join(self.faults[:20])
        return f"{found}\n{verdict}"


def audit(run: Path) -> Audit:
    """Read the ledger of a run folder and check it. Raises UserError if there is none."""
    if not run.is_dir():
        raise UserError(f"audit {run}", "there is no such folder", "give a run's folder")
    folder = run / "ledger"
    if not (folder / "run.json").exists():
        raise UserError(f"audit {run}", "it holds no ledger", "train with --ledger")
    facts = json.loads((folder / "run.json").read_text())
    samples, rows = facts["samples"], facts["rows"]
    files = sorted(folder.glob("rank-*.jsonl"))
    steps = _final_attempts(files)
    faults = [f"step {s} is missing" for s in range(max(steps, default=-1) + 1) if s not in steps]
    found = {s: [i for _, part in sorted(steps[s]) for i in part] for s in sorted(steps)}
    faults += [
        f"step {s}: {len(found[s])} of {rows} rows are recorded" for s in found if len(found[s]) != rows
    ]
    ids = [i for s in found for i in found[s]]
    used = np.array([i for i in ids if i != ABSENT], dtype=np.int64)
    for epoch, start in enumerate(range(0, len(used), samples)):
        faults += _epoch_faults(epoch, used[start : start + samples], samples)
    return Audit(samples, len(steps), len(used) // samples, len(used), len(files), faults)


def _final_attempts(files: list[Path]) -> dict[int, list[tuple[int, list[int]]]]:
    """For each step, what its last attempt computed: pairs of first micro-batch and sample ids."""
    attempts: dict[int, int] = {}
    steps: dict[int, list[tuple[int, list[int]]]] = {}
    for path in files:
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # half a line, of a killed attempt that was done again
            step, attempt = line["step"], line["attempt"]
            if attempt > attempts.get(step, -1):
                attempts[step], steps[step] = attempt, []
            if attempt == attempts[step]:
                steps[step].append((line["first"], line["samples"]))
    return steps


def _epoch_faults(epoch: int, ids: np.ndarray, samples: int) -> list[str]:
    counts = np.bincount(ids, minlength=samples)
    faults = [f"epoch {epoch}: sample {i} was used {counts[i]} times" for i in np.flatnonzero(counts > 1)]
    if len(ids) == samples:
        faults += [f"epoch {epoch}: sample {i} was never used" for i in np.flatnonzero(counts == 0)]
    return faults
