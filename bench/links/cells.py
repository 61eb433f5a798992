"""What is compared: a line for each strategy and codec, and for each peer."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.jobs import SHOAL

ROUND = 16  # local steps between two exchanges, of every strategy that has such a round
BASELINE = "ddp-float32"


@dataclass(frozen=True)
class Cell:
    """A tool, "shoal" or a module of `bench.links.peers`, with what sets it apart from the main job's recipe."""

    tool: str
    flags: str = ""
    bf16: bool = True  # the recipe's arithmetic on a processor that has it


CELLS = {
    BASELINE: Cell("ddp", bf16=False),
    "ddp": Cell("ddp"),
    "ddp-powersgd": Cell("ddp", "--powersgd 4"),
    "torchft-diloco": Cell("torchft_diloco", f"--sync-every {ROUND}"),
    "allreduce-float32": Cell("shoal", "--strategy allreduce", bf16=False),
    "allreduce": Cell("shoal", "--strategy allreduce"),
    "allreduce-bf16": Cell("shoal", "--strategy allreduce --codec bf16"),
    "allreduce-fp16": Cell("shoal", "--strategy allreduce --codec fp16"),
    "allreduce-int8": Cell("shoal", "--strategy allreduce --codec int8"),
    "allreduce-int4": Cell("shoal", "--strategy allreduce --codec int4"),
    "allreduce-sign": Cell("shoal", "--strategy allreduce --codec sign"),
    "allreduce-topk": Cell("shoal", "--strategy allreduce --codec topk"),
    "allreduce-randomk": Cell("shoal", "--strategy allreduce --codec randomk"),
    "allreduce-powersgd": Cell("shoal", "--strategy allreduce --codec powersgd"),
    "allreduce-powersgd2": Cell("shoal", "--strategy allreduce --codec powersgd --rank 2"),
    "local4-powersgd": Cell("shoal", "--strategy local --sync-every 4 --codec powersgd"),
    "local8-powersgd": Cell("shoal", "--strategy local --sync-every 8 --codec powersgd"),
    "local": Cell("shoal", f"--strategy local --sync-every {ROUND}"),
    "local-int8": Cell("shoal", f"--strategy local --sync-every {ROUND} --codec int8"),
    "diloco": Cell("shoal", f"--strategy diloco --sync-every {ROUND}"),
    "diloco-int8": Cell("shoal", f"--strategy diloco --sync-every {ROUND} --codec int8"),
    "diloco-streaming": Cell("shoal", f"--strategy diloco --sync-every {ROUND} --fragments 4"),
    "server": Cell("shoal", "--strategy server"),
    "server-int8": Cell("shoal", "--strategy server --codec int8"),
    "async": Cell("shoal", "--strategy async"),
    "async-int8": Cell("shoal", "--strategy async --codec int8"),
    "gossip": Cell("shoal", "--strategy gossip"),
    "gossip-int8": Cell("shoal", "--strategy gossip --codec int8"),
    "demo": Cell("shoal", "--strategy demo"),
    "ddp-compile": Cell("ddp", "--compile"),
    "allreduce-compile": Cell("shoal", "--strategy allreduce --compile"),
    "allreduce-int8-compile": Cell("shoal", "--strategy allreduce --codec int8 --compile"),
    "allreduce-powersgd-compile": Cell("shoal", "--strategy allreduce --codec powersgd --compile"),
    "local-compile": Cell("shoal", f"--strategy local --sync-every {ROUND} --compile"),
}


@dataclass(frozen=True)
class Settings:
    """What all cells share: the data, and how long the recipe's schedule is."""

    work: Path
    cache: Path
    steps: int

    @property
    def evaluate_every(self) -> int:
        """About a sixth of the run, in whole rounds: between rounds local replicas differ."""
        return max(1, self.steps // 6 // ROUND) * ROUND

    def recipe(self, cell: Cell, folder: Path) -> list[str]:
        """The flags of the main job's recipe, which are the defaults, with what the benchmark needs."""
        words = ["--data", "builtin", "--cache-dir", str(self.cache), "--output-dir", str(folder)]
        words += ["--max-steps", str(self.steps), "--eval-steps", str(self.evaluate_every)]
        words += ["--save-steps", "0", "--threads", "1", "--balance", "off"]
        return [*words, "--bf16" if cell.bf16 else "--no-bf16"]


def command(cell: Cell, settings: Settings, folder: Path) -> list[str]:
    """The words that start one worker of a cell; it leaves `folder`/metrics.jsonl on rank 0."""
    recipe = settings.recipe(cell, folder)
    if cell.tool == "shoal":
        return [SHOAL, "train", *recipe, *cell.flags.split()]
    return [sys.executable, "-m", f"bench.links.peers.{cell.tool}", *cell.flags.split(), *recipe]
