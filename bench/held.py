"""What a rank holds in memory: against the formula of its layout, and a model that no rank could hold alone."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from bench.jobs import SHOAL, WORKERS, Corpus, places

COMMON = ["--no-bf16", "--global-batch-size", "8", "--per-device-train-batch-size", "1", "--threads", "1"]
CASES = {
    "zero1": ["--strategy", "zero1"],
    "zero2": ["--strategy", "zero2"],
    "zero3": ["--strategy", "zero3"],
    "zero3, checkpointing": ["--strategy", "zero3", "--gradient-checkpointing"],
    "zero3, adamw-8bit": ["--strategy", "zero3", "--optim", "adamw-8bit"],
    "tensor parallel": ["--tp", str(WORKERS)],
}
WATCHED = [
    *("--model", "llama-tiny", "--model.hidden-size", "256", "--model.num-hidden-layers", "32"),
    *("--model.num-attention-heads", "4", "--model.intermediate-size", "704", "--sequence-length", "64"),
]

SHARERS = 4  # ranks that hold the large model together
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": 32}
BYTES_OF_EACH = 16  # of a parameter: itself, its gradient, AdamW's two moments, in float32
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the C library gives freed memory back to the system
# Where control groups are, by the version of the kernel's interface, and the file of the limit.
GROUPS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}
LOOK = 0.02  # seconds


def parts(corpus: Corpus, case: str) -> dict[str, Any]:
    """What `--memory-report` has of worker 0 in a case: part -> bytes measured, and by formula."""
    with TemporaryDirectory(dir=corpus.work) as name:
        words = [SHOAL, "train", "--data", "builtin", "--cache-dir", str(corpus.cache), *WATCHED, *COMMON]
        words += [
            "--nproc-per-node",
            str(WORKERS),
            "--max-steps",
            "2",
            "--eval-fraction",
            "0",
            "--memory-report",
        ]
        subprocess.run([*words, *CASES[case], "--output-dir", name], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(Path(name, "summary.json").read_text())["memory"]
        return found


def within_a_limit(corpus: Corpus) -> tuple[int, int, list[int], list[int]]:
    """A model of three allowances: the bytes of one, and what each process ended with, four together and one alone.

    The limit (a control group for each process, which takes root) is what the same command takes with two tiny
    layers, plus the allowance; the first number is that limit. Pages of files count, but give way.
    """
    needed = BYTES_OF_EACH * _parameters(corpus, LARGE)
    allowance = needed // 3
    tiny = LARGE | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    base = _train(corpus, SHARERS, tiny, None)[1]
    alone = _train(corpus, 1, tiny, None)[1]
    together, _ = _train(corpus, SHARERS, LARGE, base + allowance)
    single, _ = _train(corpus, 1, LARGE, alone + allowance)
    return base + allowance, allowance, together, single


def _parameters(corpus: Corpus, model: dict[str, int]) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shoal.data import tokenizer

    with torch.device("meta"):
        config = AutoConfig.for_model("llama", vocab_size=len(tokenizer.load(str(corpus.tokenizer))), **model)
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _train(corpus: Corpus, ranks: int, model: dict[str, int], limit: int | None) -> tuple[list[int], int]:
    """Three steps on so many ranks: how each ended, and the most memory of its own that one of them held."""
    words = [SHOAL, "train", "--data", "builtin", "--cache-dir", str(corpus.cache), "--model", "llama-tiny"]
    words += [word for key, size in model.items() for word in (f"--model.{key.replace('_', '-')}", str(size))]
    words += ["--sequence-length", "64", *COMMON, "--max-steps", "3", "--eval-fraction", "0"]
    words += ["--gradient-checkpointing", *(["--strategy", "zero3"] if ranks > 1 else [])]
    with TemporaryDirectory(dir=corpus.work) as name, ExitStack() as ending:
        started = [
            subprocess.Popen(
                [*words, "--output-dir", name],
                env=os.environ | AT_ONCE | each,
                preexec_fn=None if limit is None else ending.enter_context(_limited(limit)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if limit else None,
            )
            for each in places(ranks)
        ]
        for process in started:
            ending.callback(process.wait)
            ending.callback(process.kill)
        most = 0
        while any(process.poll() is None for process in started):
            most = max(most, *(_held(process.pid) for process in started))
            time.sleep(LOOK)
        return [process.returncode for process in started], most


@contextmanager
def _limited(most: int) -> Iterator[Callable[[], None]]:
    """What a process calls at its start to have no more memory than this."""
    root, limit = next((Path(root), name) for root, name in GROUPS.items() if Path(root).is_dir())
    group = Path(mkdtemp(prefix="shoal-bench-", dir=root))
    (group / limit).write_text(str(most))

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        group.rmdir()  # of its files the kernel takes care


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))
