"""What is exported loads by transformers alone, gives the same logits, and never harms what was there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.config.record import ModelConfig
from shoal.errors import ShoalError
from shoal.models import export as exporting
from shoal.models.export import export
from shoal.models.loading import load


def model(
    named: Callable[..., ModelConfig], words: Any, preset: str = "llama-tiny", seed: int = 1
) -> PreTrainedModel:
    return load(named(preset), len(words), 16, words, seed=seed)


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "gpt-neox-tiny", "qwen-tiny", "lstm-tiny"])
def test_round_trip(preset: str, tmp_path: Path, named: Callable[..., ModelConfig], words: Any) -> None:
    ours = model(named, words, preset)
    export(ours, words, tmp_path / "final", {"steps": 7, "data": {"path": "a|b"}})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids).logits)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == ours.config.tie_word_embeddings
    assert theirs.generation_config.eos_token_id == words.eos_token_id
    assert theirs.generation_config.pad_token_id is not None
    text = "the shoal turns"
    assert AutoTokenizer.from_pretrained(tmp_path / "final").encode(text) == words.encode(text)
    assert not list((tmp_path / "final").glob("*.bin"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert "| steps | 7 |" in card
    assert r"a\|b" in card
    assert [each.name for each in tmp_path.iterdir()] == ["final"]


def test_what_differs_when_loaded_replaces_nothing(
    tmp_path: Path, named: Callable[..., ModelConfig], words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model(named, words, seed=1), words, tmp_path / "final", {})
    before = (tmp_path / "final" / "model.safetensors").read_bytes()
    write = exporting._write

    def bit_rot(trained: PreTrainedModel, tokenizer: Any, folder: Path, card: Any) -> None:
        write(trained, tokenizer, folder, card)
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 0x40
        (folder / "model.safetensors").write_bytes(weights)

    monkeypatch.setattr(exporting, "_write", bit_rot)
    with pytest.raises(ShoalError, match="loaded again"):
        export(model(named, words, seed=2), words, tmp_path / "final", {})
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["final"]


def test_a_second_export_takes_the_place_of_the_first(
    tmp_path: Path, named: Callable[..., ModelConfig], words: Any
) -> None:
    for seed in (1, 2):
        export(model(named, words, seed=seed), words, tmp_path / "final", {})
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "final").get_input_embeddings().weight
    assert torch.equal(stored, model(named, words, seed=2).get_input_embeddings().weight)


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, named: Callable[..., ModelConfig], words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model(named, words), words, tmp_path / "final", {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_card_text", full)
    with pytest.raises(ShoalError, match="No space left"):
        export(model(named, words, seed=2), words, tmp_path / "final", {})
    assert [each.name for each in tmp_path.iterdir()] == ["final"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
