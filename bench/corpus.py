"""The data of all jobs: prepared by shoal's own command, and laid out as plain windows for the peers."""

import os
import subprocess
from pathlib import Path

import numpy as np

from bench.jobs import SHOAL, WINDOW, Corpus
from shoal.data.shards import TokenStream


def prepare(work: Path) -> Corpus:
    """Prepare the built-in corpus in `work` with a vocabulary of 4096."""
    cache = work / "cache"
    words = [SHOAL, "prepare", "--data", "builtin", "--cache-dir", str(cache)]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    folder = Path(said.splitlines()[-1])
    windows = work / "windows.npy"
    np.save(windows, _windows(TokenStream(folder, "train")), allow_pickle=False)
    return Corpus(work, cache, folder / "tokenizer", windows)


def _windows(stream: TokenStream) -> np.ndarray:
    """The stream cut into rows: uint16 [windows, WINDOW]."""
    count = stream.tokens // WINDOW
    ids, _ = stream.read(0, count * WINDOW)
    return ids.astype(np.uint16).reshape(count, WINDOW)
