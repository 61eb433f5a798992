"""`--model` by preset, folder and hub name, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import saved
from transformers import AutoModelForCausalLM

from shoal.config.presets import PRESETS
from shoal.config.record import ModelConfig
from shoal.errors import UserError
from shoal.models.export import export
from shoal.models.loading import check_name, load

Named = Callable[..., ModelConfig]


@pytest.fixture
def folder(tmp_path: Path, named: Named, words: Any) -> Path:
    """A trained model's folder."""
    model = load(named("llama-tiny"), len(words), 16, words, seed=5)
    export(saved(model, words, tmp_path / "checkpoint-1") / "model", tmp_path / "final", {"steps": 1})
    return tmp_path / "final"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_function_of_the_seed(preset: str, named: Named, words: Any) -> None:
    first, again, other = (load(named(preset), len(words), 16, words, seed=seed) for seed in (1, 1, 2))
    assert first.training
    assert first.dtype == torch.float32
    assert first.config.hidden_size == 48
    assert first.config.num_hidden_layers == 2
    assert first.config.eos_token_id == words.eos_token_id
    assert first.get_input_embeddings().weight.shape == (len(words), 48)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "lstm-tiny"])
def test_the_token_between_documents_learns(preset: str, named: Named, words: Any) -> None:
    """As a padding token its embedding would stay as it began."""
    model = load(named(preset), len(words), 16, words)
    ids = torch.tensor([[words.eos_token_id, 5, 6]])
    model(input_ids=ids).logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[words.eos_token_id].abs().sum() > 0


def test_a_folder_brings_its_weights(folder: Path, named: Named, words: Any) -> None:
    loaded = load(named(str(folder)), len(words), 16, words, seed=99)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for ours, stored in zip(loaded.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, stored)


def test_a_folder_at_random_when_asked(folder: Path, named: Named, words: Any) -> None:
    (folder / "model.safetensors").unlink()
    fresh = load(named(str(folder), from_config=True), len(words), 16, words)
    assert fresh.config.hidden_size == 48
    with pytest.raises(UserError, match=r"no weights; .*from_config"):
        load(named(str(folder)), len(words), 16, words)


def test_pickled_weights_are_never_read(folder: Path, named: Named, words: Any) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model.bin\).*safetensors"):
        load(named(str(folder)), len(words), 16, words)


def test_broken_weights_are_refused(folder: Path, named: Named, words: Any) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="--model"):
        load(named(str(folder)), len(words), 16, words)


def test_other_dimensions_than_the_weights_are_refused(folder: Path, named: Named, words: Any) -> None:
    with pytest.raises(UserError, match="--model"):
        load(named(str(folder), num_hidden_layers=3), len(words), 16, words)
    with pytest.raises(UserError, match="--model"):
        load(named(str(folder), intermediate_size=32), len(words), 16, words)


@pytest.mark.parametrize(
    ("name", "overrides", "sequence_length", "says"),
    [
        ("lama-tiny", {}, 16, "did you mean llama-tiny"),
        ("llama-tiny", {"hiden_size": 64}, 16, "--model.hiden_size.*did you mean --model.hidden_size"),
        ("llama-tiny", {"hidden_size": "wide"}, 16, "expected int"),
        ("llama-tiny", {"hidden_size": 30}, 16, "not a multiple"),
        ("gpt2-tiny", {}, 1025, "--sequence-length 1025: .*at most 1024"),
        ("gpt2-tiny", {"vocab_size": 100}, 16, "the tokenizer has .* the embedding 100"),
    ],
)
def test_bad_input_in_one_line(
    name: str, overrides: dict[str, Any], sequence_length: int, says: str, named: Named, words: Any
) -> None:
    with pytest.raises(UserError, match=says) as refused:
        load(named(name, **overrides), len(words), sequence_length, words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lama-tiny", "did you mean llama-tiny"),
        ("GPT-2", "did you mean gpt2"),
        ("a/b/c", "no name that the hub could hold; presets are llama-tiny"),
        ("./nowhere", "no name that the hub could hold"),
    ],
)
def test_what_the_hub_cannot_hold_is_not_asked_for(
    name: str, says: str, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match=says):
        load(ModelConfig(name=name), len(words), 16, words)


@pytest.mark.parametrize(
    "name", ["distilgpt2", "gpt2-medium", "bert-base-uncased", "t5-small", "x/llama-tiny"]
)
def test_what_the_hub_may_hold_is_asked_for(name: str) -> None:
    check_name(name)


def test_a_folder_without_config(tmp_path: Path, named: Named, words: Any, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        load(named(str(tmp_path)), len(words), 16, words)
