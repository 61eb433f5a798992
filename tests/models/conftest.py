"""A tokenizer and model settings for the tests of models."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.record import ModelConfig
from shoal.data import tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is nowhere is refused at once

TEXTS = ["the shoal turns as one, and no fish leads it " * 20, "def turn(fish):\n    return fish.left\n" * 20]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE of about 290 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_bpe(TEXTS, 290, folder)
    return tokenizer.load(folder)


@pytest.fixture
def named() -> Callable[..., ModelConfig]:
    """`--model NAME` with small dimensions, and any others given."""

    def make(name: str, **overrides: Any) -> ModelConfig:
        small = {"hidden_size": 48, "num_hidden_layers": 2} if not Path(name).exists() else {}
        return ModelConfig(name=name, **(small | overrides))

    return make
