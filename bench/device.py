"""`python -m bench.device`: tokens per second, MFU and peak memory on one device, beside a loop in nanoGPT's way.

On a GPU it trains a Llama of 124M and one of 1B parameters in bf16, compiled and not, and with the optimizer's state
on the host; without one a small model, so that the script is known to run. MFU is the share of the device's bf16 peak
that 6 operations for each parameter in a matrix product and each token, and 6 L H T a token for causal attention,
come to.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import corpus, machine
from bench.jobs import SHOAL, Corpus
from bench.report import table

WARM_UP = 5  # steps that are not timed
VOCABULARY = 4096
PEAK_BF16 = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # dense, a second


@dataclass(frozen=True)
class Size:
    """A Llama, and how it is trained."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    window: int
    batch: int
    accumulation: int

    @property
    def config(self) -> dict[str, Any]:
        """Its dimensions as transformers names them."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
        }

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.window * self.batch * self.accumulation

    @property
    def operations(self) -> float:
        """For each token, forward and backward."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        products = self.layers * layer + VOCABULARY * self.hidden
        return 6.0 * (products + self.layers * self.hidden * self.window)


ON_GPU = (
    Size("124M", 768, 12, 12, 2048, window=1024, batch=32, accumulation=4),
    Size("1B", 2048, 18, 16, 5632, window=2048, batch=8, accumulation=4),
)
OFFLOADED = "state on the host"
WAYS = {"eager": [], "compiled": ["--compile"], OFFLOADED: ["--offload", "optimizer", "--threads", "8"]}
ON_CPU = (Size("7M", 256, 6, 4, 688, window=256, batch=4, accumulation=2),)


def main() -> None:
    """Run every size with both tools, eager and compiled, in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--steps", type=int, default=20, help="steps timed in a turn (20)")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with TemporaryDirectory(prefix="shoal-bench-") as work:
        data = corpus.prepare(Path(work))
        cases = [
            (size, tool, way)
            for size in (ON_GPU if device != "CPU" else ON_CPU)
            for way in WAYS
            for tool in ("shoal", "nanogpt_loop")
            if way != OFFLOADED or (tool == "shoal" and device != "CPU")
        ]
        turns: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(options.turns):
            for case in cases:
                turns[case].append(_run(*case, data, options.steps + WARM_UP))
                print(f"{case[1]} {case[0].name}: {turns[case][-1]}", file=sys.stderr, flush=True)
    print("\n".join(f"- {name}: {value}" for name, value in machine.describe().items()))
    print(f"- device: {device}\n")
    print(table(("model", "tool", "", "tokens/s", "MFU", "peak GiB"), _rows(turns, device)))


def _rows(turns: dict[Any, list[tuple[float, float]]], device: str) -> Iterator[tuple[str, ...]]:
    peak = next((peak for name, peak in PEAK_BF16.items() if name in device), None)
    for (size, tool, way), found in turns.items():
        speed, memory = median(s for s, _ in found), max(m for _, m in found)
        mfu = f"{speed * size.operations / peak:.1%}" if peak else ""
        yield size.name, tool, way, f"{speed:,.0f}", mfu, f"{memory:.2f}"


def _run(size: Size, tool: str, way: str, data: Corpus, steps: int) -> tuple[float, float]:
    """Tokens a second over the timed steps, and the most memory held, in GiB."""
    with TemporaryDirectory(dir=data.work) as name:
        metrics = Path(name) / "metrics.jsonl"
        words = (
            _shoal(size, data, steps, Path(name)) if tool == "shoal" else _peer(size, data, steps, metrics)
        )
        subprocess.run(words + WAYS[way], check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [record["perf/step_seconds"] for record in records if "perf/step_seconds" in record][WARM_UP:]
    last = records[-1] if tool != "shoal" else records[steps - 1]
    held = last.get("mem/peak_device_gib", last.get("mem/peak_rss_gib"))
    return size.step_tokens / median(seconds), float(held)


def _shoal(size: Size, data: Corpus, steps: int, folder: Path) -> list[str]:
    words = [
        SHOAL,
        "train",
        "--model",
        "llama-124m",
        "--cache-dir",
        str(data.cache),
        "--output-dir",
        str(folder),
    ]
    for key, value in size.config.items():
        words += [f"--model.{key}", str(value)]
    words += ["--sequence-length", str(size.window), "--per-device-train-batch-size", str(size.batch)]
    words += ["--global-batch-size", str(size.batch * size.accumulation), "--max-steps", str(steps)]
    return [*words, "--nproc-per-node", "1", "--bf16", "--save-steps", "0", "--eval-fraction", "0"]


def _peer(size: Size, data: Corpus, steps: int, metrics: Path) -> list[str]:
    config = json.dumps({**size.config, "vocab_size": VOCABULARY, "tie_word_embeddings": True})
    words = [
        sys.executable,
        "-m",
        "bench.peers.nanogpt_loop",
        "--windows",
        str(data.windows),
        "--model",
        config,
    ]
    words += ["--metrics", str(metrics), "--batch", str(size.batch), "--window", str(size.window)]
    return [*words, "--accumulation", str(size.accumulation), "--steps", str(steps)]


if __name__ == "__main__":
    main()
