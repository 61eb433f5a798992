"""A loop on one device in nanoGPT's way: the model compiled whole, bf16 autocast, fused AdamW, tokens from a file."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers import common


def main() -> None:
    """Train for the steps asked for; a line of JSON each."""
    job = _arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(42)
    llama = LlamaForCausalLM(LlamaConfig(**json.loads(job.model), use_cache=False)).train().to(device)
    if job.compile:
        llama.compile()
    optimizer = common.adamw(llama.parameters())
    windows = np.load(job.windows, mmap_mode="r", allow_pickle=False).reshape(-1)
    draw = np.random.default_rng(42)
    with job.metrics.open("a") as metrics:
        for step in range(job.steps):
            started = time.perf_counter()
            for _ in range(job.accumulation):
                ids = _batch(windows, draw, job.batch, job.window, device)
                with torch.autocast(device, torch.bfloat16):
                    loss = llama(input_ids=ids, labels=ids).loss / job.accumulation
                loss.backward()
            torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            line = {"step": step + 1, "perf/step_seconds": time.perf_counter() - started, **_memory()}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=Path, required=True, help="token ids, .npy")
    parser.add_argument("--metrics", type=Path, required=True, help="a line of JSON a step")
    parser.add_argument("--model", required=True, help="the dimensions of the Llama, as JSON")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, required=True, help="windows in a micro-batch")
    parser.add_argument("--window", type=int, required=True, help="tokens in a window")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def _batch(tokens: np.ndarray, draw: np.random.Generator, rows: int, window: int, device: str) -> Tensor:
    starts = draw.integers(0, len(tokens) - window, rows)
    ids = torch.from_numpy(np.stack([tokens[i : i + window] for i in starts]).astype(np.int64))
    return ids.pin_memory().to(device, non_blocking=True) if device == "cuda" else ids


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"mem/peak_device_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"mem/peak_rss_gib": common.peak_rss_gib()}


if __name__ == "__main__":
    main()
