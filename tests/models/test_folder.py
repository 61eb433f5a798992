"""Model folders that are no plain causal language model: what trains of them, and what each other one is called."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import saved
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.config.record import ModelConfig
from shoal.errors import UserError
from shoal.models import proof
from shoal.models.export import check_same_logits, export
from shoal.models.loading import check_name, load
from shoal.models.pretrained import remarks

Change = Callable[[Path], object]
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
TEXT = SIZES | {
    "head_dim": 8,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = SIZES | {"image_size": 28, "patch_size": 14}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configured(**changes: Any) -> Change:
    return lambda folder: rewritten(folder / "config.json", lambda config: json.dumps(config | changes))


def rewritten(file: Path, change: Callable[[Any], str]) -> None:
    file.write_text(change(json.loads(file.read_text())))


def quantised(**how: Any) -> Change:
    return configured(quantization_config=how)


def instead(**files: str) -> Change:
    """Only these files, by name with _ for a dot, and what is in them."""

    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        for name, text in files.items():
            (folder / ".".join(name.rsplit("_", 1))).write_text(text)

    return change


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(7)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (configured(model_type="never"), "does not know its model_type never; update transformers"),
        (
            configured(model_type="own", auto_map={"AutoConfig": "configuration_own.Own"}),
            r"needs code that comes with it \(configuration_own.py\), which is never run",
        ),
        (lambda f: (f / "config.json").write_text('{\n "model_type": "lla'), r"config.json, line 2: not JSON"),
        (lambda f: (f / "config.json").write_text(""), r"config.json, line 1: not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), r"config.json: no JSON that can be read"),
        (lambda f: (f / "config.json").write_text('["llama"]'), "names no model_type"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (configured(hidden_size="wide"), "config.json is refused: .*expected int"),
        (configured(model_type="vit"), "vit is no causal language model"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights; .*from_config"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.git"), "pointer of Git LFS"),
        (reshaped, r"model.norm.weight of its weights is \(7,\), the configuration has \(16,\)"),
        (
            instead(adapter_config_json='{"base_model_name_or_path": "big/one"}', adapter_model_safetensors=""),
            "only a PEFT adapter of big/one; merge",
        ),
        (instead(model_gguf="GGUF"), r"GGUF weights \(model.gguf\)"),
        (quantised(quant_method="gptq", bits=4), r"quantised \(gptq\).*name the model as it was before"),
        (quantised(quant_method="awq", bits=4), r"quantised \(awq\)"),
        (quantised(load_in_4bit=True), r"quantised \(bitsandbytes\)"),
        (quantised(quant_method="new"), r"quantised \(new\)"),
        (
            lambda f: T5ForConditionalGeneration(T5Config(**SIZES, d_model=8, d_kv=4, d_ff=8)).save_pretrained(f),
            "t5 is no causal language model",
        ),
    ],
)  # fmt: skip
def test_what_a_folder_is_is_said_in_one_line(change: Change, says: str, folder: Path, words: Any) -> None:
    change(folder)
    with pytest.raises(UserError, match=says) as refused:
        load(ModelConfig(name=str(folder)), len(words), 16, words)
    assert str(refused.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(refused.value)
    for wrong in ("no such folder", "no preset", "hub"):
        assert wrong not in str(refused.value)


def test_a_bad_folder_is_found_before_its_tokenizer_is_asked_for(folder: Path) -> None:
    configured(model_type="never")(folder)
    with pytest.raises(UserError, match="model_type never"):
        check_name(str(folder))


@pytest.mark.parametrize("packing", [True, False])
def test_an_encoder_is_refused_and_trains_as_a_decoder(packing: bool, folder: Path, words: Any) -> None:
    wide = BertConfig(
        **SIZES, vocab_size=300, initializer_range=0.5
    )  # so that a token seen shows above rounding
    AutoModelForCausalLM.from_config(wide).save_pretrained(folder)
    encoder, decoder = (
        load(ModelConfig(name=str(folder), **chosen), len(words), 16, words)
        for chosen in ({}, {"is_decoder": True})
    )
    says = "bert: BertLMHeadModel reads ahead: .*--model.is_decoder true makes one of bert"
    with torch.no_grad(), pytest.raises(UserError, match=says):
        proof.check_hidden(encoder, "bert", 16, packing, torch.float32)
    with torch.no_grad():
        proof.check_hidden(decoder, "bert", 16, packing, torch.float32)


@torch.no_grad()
def check_export(model: Any, words: Any, folder: Path) -> dict[str, Any]:
    """The configuration of what is exported of a model, once it has been loaded and compared."""
    source = saved(model, words, folder / "checkpoint-1") / "model"
    export(source, folder / "final", {}, check=partial(check_same_logits, model))
    _, report = AutoModelForCausalLM.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(report.values()), report
    config: dict[str, Any] = json.loads((folder / "final" / "config.json").read_text())
    return config


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "llama4"])
@torch.no_grad()
def test_of_text_and_images_the_text_part_trains(kind: str, tmp_path: Path, words: Any) -> None:
    """Gemma 3 names its text model's type, LLaVA any; of Mistral 3 the two configurations tie otherwise."""
    texts = {"gemma3": "gemma3_text", "llama4": "llama4_text", "llava": "llama", "mistral3": "mistral"}
    visions: dict[str, dict[str, Any]] = {
        "gemma3": VISION | {"model_type": "siglip_vision_model"},
        "llava": VISION | {"model_type": "clip_vision_model"},
        "mistral3": VISION | {"model_type": "pixtral"},
        "llama4": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    }
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 16} if kind == "llama4" else {}
    text = TEXT | experts | {"model_type": texts[kind], "vocab_size": len(words)}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=visions[kind])
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "model")
    model = load(ModelConfig(name=str(tmp_path / "model")), len(words), 16, words)
    assert model.config.model_type == texts[kind]
    assert model.base_model is not model
    assert not any("vision" in name for name, _ in model.named_parameters())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model.eval()(ids).logits, whole(input_ids=ids).logits)
    assert f"text part of {kind}" in remarks(str(tmp_path / "model"))[0]
    assert check_export(model, words, tmp_path)["model_type"] == texts[kind]


@torch.no_grad()
def test_fp8_weights_become_plain_ones(folder: Path, tmp_path: Path, words: Any) -> None:
    """As transformers reads them: 8-bit values, and a scale for each block."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = torch.full((1, 1), tensors[name].abs().max().item() / 448)
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        plain.get_parameter(name).copy_(tensors[name].float() * scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantised(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])(folder)
    model = load(ModelConfig(name=str(folder)), len(words), 16, words)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)
    assert model.dtype == torch.float32
    assert remarks(str(folder)) == ["fp8 weights are turned into plain ones, and saved as such"]
    assert "quantization_config" not in check_export(model, words, tmp_path)
