"""What the peers share: arguments, model, data, optimizer, and a record of every step."""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

KIB_IN_GIB = 2**20


def arguments() -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=Path, required=True, help="token ids [windows, tokens], .npy")
    parser.add_argument("--metrics", type=Path, required=True, help="rank 0 adds a line of JSON a step")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=8, help="windows in a micro-batch of one worker")
    parser.add_argument(
        "--layout", choices=["zero2", "zero3", "tp", "pp"], help="how a replica is cut, where the tool can"
    )
    parser.add_argument("--defaults", action="store_true", help="leave all else as the tool has it")
    return parser.parse_args()


def llama() -> LlamaForCausalLM:
    """The Llama of every run, in float32, without the cache that only generation needs."""
    torch.manual_seed(42)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=688,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in one fused kernel."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def loop(job: argparse.Namespace, model: nn.Module) -> None:
    """The loop as an expert writes it by hand, until the data or whoever measures ends it."""
    optimizer = adamw(model.parameters())
    windows = Windows(job.windows)
    loader = DataLoader(windows, job.batch, sampler=DistributedSampler(windows), drop_last=True)
    record = Record(job.metrics)
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.step()


class Windows(Dataset[dict[str, Tensor]]):
    """Rows of a memory-mapped file; the model shifts the labels itself."""

    def __init__(self, file: Path) -> None:
        self.ids = np.load(file, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Record:
    """Writes of each step how long it took since the one before, and the most memory held so far."""

    def __init__(self, file: Path) -> None:
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.file = file.open("a") if self.speaks else None
        self.steps = 0
        self.last = time.perf_counter()

    def step(self) -> None:
        """A step is over."""
        now = time.perf_counter()
        self.steps += 1
        if self.file is not None:
            line = {
                "step": self.steps,
                "perf/step_seconds": now - self.last,
                "mem/peak_rss_gib": peak_rss_gib(),
            }
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.last = now


def peak_rss_gib() -> float:
    """The most memory this process has held (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / KIB_IN_GIB
