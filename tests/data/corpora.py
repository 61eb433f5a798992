"""What the tests of the data share: texts, a configuration, and documents read back from token shards."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal.data.shards import Split, TokenStream
from shoal.data.tokenizer import open_fast


@dataclass
class Data:
    """The data section as `prepare` sees it."""

    path: list[str]
    cache_dir: str
    text_field: str = "text"
    vocab_size: int = 300
    eval_path: list[str] = field(default_factory=list)
    eval_fraction: float = 0.1


WORDS = ("the fish swim ebb fläche 潮 drift net,", "a\tb", "  deep", "42", "x=y\n", '"quoted"', "\n\n", "🐟")


def some_text(seed: int, words: int) -> str:
    """Text with every difficulty: several scripts, quotes, tabs and runs of line ends."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def documents_of(folder: Path, split: Split) -> list[str]:
    """The texts of a split, decoded from its token shards, in stream order."""
    stream = TokenStream(folder, split)
    ids, owners = stream.read(0, stream.tokens)
    tokenizer = open_fast(folder / "tokenizer")
    texts = []
    for document in range(stream.documents):
        tokens = ids[owners == document].tolist()
        assert tokens[: len(stream.prefix)] == stream.prefix
        assert tokens[len(tokens) - len(stream.suffix) :] == stream.suffix
        texts.append(tokenizer.decode(tokens[len(stream.prefix) : len(tokens) - len(stream.suffix)]))
    assert np.all(np.diff(owners) >= 0)
    return texts


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
