"""`python -m bench.demos.flat`: one batch split 8 ways over workers, accumulation and micro-batches: one loss curve.

Documents of unequal length, a row each, train a small model for some steps, once for each way to split the batch,
with shoal and with the Hugging Face Trainer. Of each tool it prints by how much the loss of any step differs between
its own curves, where every one is a correct run: of a Llama split 8 ways, and of a GPT-2 with its dropout of 0.1,
whose micro-batches of 2 rows are computed by 1 to 4 workers. The Trainer cannot give 16 rows to 3 workers.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench import machine
from bench.jobs import SHOAL, places
from bench.report import table
from shoal.data.builtin import source_files
from shoal.data.shards import TokenStream

BATCH, WINDOW, DOCUMENTS, VOCABULARY = 16, 128, 2000, 1024
DIMS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Split:
    """A way to compute the 16 rows of a step: so many workers, and rows in a micro-batch."""

    workers: int
    rows: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a worker; 0 where they cannot be equally many."""
        count, left = divmod(BATCH, self.workers * self.rows)
        return 0 if left else count

    def __str__(self) -> str:
        each = self.accumulation or "unequally many"
        return f"workers {self.workers}, of each {each} micro-batches of {self.rows} rows"


SPLITS = {
    "llama": [Split(*each) for each in ((1, 16), (1, 4), (1, 1), (2, 8), (2, 4), (2, 1), (4, 4), (4, 1))],
    "gpt2": [Split(workers, 2) for workers in (1, 2, 3, 4)],
}


def main() -> None:
    """Train each way with both tools, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.demos.flat", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each run (20)")
    steps = parser.parse_args().steps
    tables = []
    with TemporaryDirectory(prefix="shoal-flat-") as name:
        work = Path(name)
        rows = _rows(work)
        for model, splits in SPLITS.items():
            ours = [_shoal(work, model, split, steps) for split in splits]
            theirs = [_trainer(work, rows, model, split, steps) for split in splits]
            tables.append(_table(model, splits, ours, theirs))
    print("\n".join(f"- {what}: {found}" for what, found in machine.describe().items()), end="\n\n")
    print("\n\n".join(tables))


def _table(model: str, splits: list[Split], ours: list[list[float]], theirs: list[list[float]]) -> str:
    """The loss of the last step of every run, and the largest difference of any step's loss."""
    last = [(str(split), *map(_last, found)) for split, *found in zip(splits, ours, theirs, strict=True)]
    spread = [
        f"{np.ptp(np.array([curve for curve in curves if curve]), axis=0).max():.1e}"
        for curves in (ours, theirs)
    ]
    header = (f"{model}: last loss", "shoal", "Hugging Face Trainer")
    return table(header, [*last, ("largest difference in any step", *spread)])


def _last(curve: list[float]) -> str:
    return f"{curve[-1]:.6f}" if curve else "-"


def _rows(work: Path) -> Path:
    """Documents of 1 to 12 lines, prepared by shoal; for the peer as rows of ids: int64 [rows, WINDOW], then -1."""
    draw = random.Random(0)
    lines = [line for file in source_files() for line in file.read_text().splitlines() if line.strip()]
    firsts = [draw.randrange(len(lines) - 12) for _ in range(DOCUMENTS)]
    documents = ["\n".join(lines[first : first + draw.randint(1, 12)]) for first in firsts]
    (work / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepared = subprocess.run([SHOAL, "prepare", *_data(work)], check=True, stdout=subprocess.PIPE, text=True)
    stream = TokenStream(Path(prepared.stdout.splitlines()[-1]), "train")
    ends = [*stream.starts[1:].tolist(), stream.tokens]
    rows = np.full((stream.documents, WINDOW), -1)
    for row, start, end in zip(rows, stream.starts.tolist(), ends, strict=True):
        ids, _ = stream.read(start, min(end, start + WINDOW))
        row[: len(ids)] = ids
    np.save(work / "rows.npy", rows, allow_pickle=False)
    return work / "rows.npy"


def _data(work: Path) -> list[str]:
    words = [
        "--data",
        str(work / "documents.jsonl"),
        "--cache-dir",
        str(work / "cache"),
        "--packing",
        "false",
    ]
    return [*words, "--sequence-length", str(WINDOW), "--vocab-size", str(VOCABULARY)]


def _shoal(work: Path, model: str, split: Split, steps: int) -> list[float]:
    """The losses of the steps with shoal."""
    folder = work / f"shoal-{model}-{split.workers}-{split.rows}"
    dims = [word for name, size in DIMS.items() for word in (f"--model.{name.replace('_', '-')}", str(size))]
    words = [SHOAL, "train", *_data(work), "--model", f"{model}-tiny", *dims, "--output-dir", str(folder)]
    words += ["--precision", "32-true", "--max-steps", str(steps), "--eval-steps", "0"]
    words += ["--nproc-per-node", str(split.workers), "--threads", "1"]
    words += ["--global-batch-size", str(BATCH), "--per-device-train-batch-size", str(split.rows)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return _said(
        "shoal", model, split, [record["train/loss"] for record in records if "train/loss" in record]
    )


def _trainer(work: Path, rows: Path, model: str, split: Split, steps: int) -> list[float]:
    """The losses of the steps with the Trainer; none where it cannot split so."""
    if not split.accumulation:
        return []
    folder = work / f"trainer-{model}-{split.workers}-{split.rows}"
    words = [sys.executable, "-m", "bench.demos.flat_trainer", str(rows), str(folder), str(steps)]
    words += [
        str(split.rows),
        str(split.accumulation),
        json.dumps({"model_type": model, "vocab_size": VOCABULARY} | DIMS),
    ]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    ranks = places(split.workers) if split.workers > 1 else [{}]
    with (work / "trainer.log").open("wb") as log:
        started = [subprocess.Popen(words, env=shared | rank, stdout=log, stderr=log) for rank in ranks]
        codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"the Trainer ended with {codes}:\n{(work / 'trainer.log').read_text()[-3000:]}")
    return _said("the Trainer", model, split, json.loads((folder / "losses.json").read_text()))


def _said(tool: str, model: str, split: Split, losses: list[float]) -> list[float]:
    print(f"{tool}, {model}, {split}: {losses[-1]:.6f}", file=sys.stderr, flush=True)
    return losses


if __name__ == "__main__":
    main()
