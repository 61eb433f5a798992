"""What is exported loads by transformers alone, gives the same tensors, and never harms what was there."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from saved import saved
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    Transpose,
    WeightConverter,
    revert_weight_conversion,
)

from shoal.config.record import ModelConfig
from shoal.errors import ShoalError, UserError
from shoal.models import export as exporting
from shoal.models import families
from shoal.models.export import check_same_logits, export
from shoal.models.loading import load
from shoal.models.written import Written
from shoal.tensors import tensor_files

PRESETS = ["llama-tiny", "gpt2-tiny", "gpt-neox-tiny", "qwen-tiny", "lstm-tiny"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "head_dim": 8,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FEW = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Of each its sizes, and whether the files have more tensors than the memory.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "mixtral": (FEW | {"num_local_experts": 4}, True),
    "qwen2_moe": (FEW | {"num_experts": 4, "shared_expert_intermediate_size": 24}, True),
    "qwen3_moe": (FEW | {"num_experts": 4}, True),
    "deepseek_v3": (
        MLA
        | FEW
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        True,
    ),
    "apertus": ({"num_key_value_heads": 2}, False),  # its activation has numbers without a dim
    "granitemoe": (FEW | {"num_local_experts": 4}, False),
    "gpt_oss": (FEW | {"num_local_experts": 4}, False),
    "llama4_text": (FEW | {"num_local_experts": 4, "intermediate_size_mlp": 24}, False),
}


def model(
    named: Callable[..., ModelConfig], words: Any, kind: str = "llama-tiny", seed: int = 1
) -> PreTrainedModel:
    if kind not in FAMILIES:
        return load(named(kind), len(words), 16, words, seed=seed)
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    sizes = SIZES | special | FAMILIES[kind][0]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(words), **sizes))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset: str, tmp_path: Path, named: Callable[..., ModelConfig], words: Any) -> None:
    ours = model(named, words, preset)
    source = saved(ours, words, tmp_path / "source" / "checkpoint-1")
    check = partial(check_same_logits, ours)
    export(source / "model", tmp_path / "out" / "final", {"steps": 7, "data": {"path": "a|b"}}, check=check)
    final = tmp_path / "out" / "final"
    theirs = AutoModelForCausalLM.from_pretrained(final)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids).logits)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == ours.config.tie_word_embeddings
    assert theirs.generation_config.eos_token_id == words.eos_token_id
    assert theirs.generation_config.pad_token_id is not None
    text = "the shoal turns"
    assert AutoTokenizer.from_pretrained(final).encode(text) == words.encode(text)
    card = (final / "README.md").read_text()
    assert "| steps | 7 |" in card
    assert r"a\|b" in card
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["final"]


@pytest.mark.parametrize("kind", [*PRESETS, *FAMILIES])
@pytest.mark.parametrize("cut", [{}, {"ranks": 3}, {"ranks": 2, "dim": 1}], ids=["whole", "rows", "columns"])
def test_the_same_folder_as_save_pretrained(
    kind: str, cut: dict[str, int], tmp_path: Path, named: Callable[..., ModelConfig], words: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Names, tensors, shards and configuration, from pieces of any cut, in blocks of a few rows.

    Experts too: each has its own tensors in the files of most families, and is a part of one in memory.
    """
    monkeypatch.setattr(tensor_files, "BLOCK", 1000)
    ours = model(named, words, kind)
    source = saved(ours, words, tmp_path / "checkpoint-1", **cut)
    export(source / "model", tmp_path / "final", {}, max_shard_size="30KB")
    ours.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    mine, theirs = tmp_path / "final", tmp_path / "theirs"
    assert len(list(mine.glob("*.safetensors"))) > 2
    for name in ("config.json", "model.safetensors.index.json"):
        one, other = (json.loads((folder / name).read_text()) for folder in (mine, theirs))
        if kind in FAMILIES:  # the library keeps in one file what is a view of one tensor
            one["weight_map"], other["weight_map"] = (
                sorted(each.pop("weight_map", ())) for each in (one, other)
            )
        assert one == other
    a, b = weights_in(mine), weights_in(theirs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    if kind in FAMILIES:
        assert (len(a) > len(ours.state_dict())) == FAMILIES[kind][1]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.values()), report
    for (name, p), q in zip(ours.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    "converters",
    [
        [
            WeightConverter(
                "self_attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [Chunk(0)]
            )
        ],
        [WeightConverter("mlp.wide.weight", "mlp.up_proj.weight", [Interleave(0)])],
        [WeightConverter("mlp.wide.weight", "mlp.up_proj.weight", [Transpose(0, 1)])],
        [WeightConverter(["mlp.a", "mlp.b"], "mlp.up_proj.weight", [Concatenate(1)])],
    ],
    ids=["joined", "interleaved", "transposed", "cut"],
)
def test_whatever_the_library_makes_of_a_tensor(
    converters: list[WeightConverter], tmp_path: Path, named: Callable[..., ModelConfig], words: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tensor_files, "BLOCK", 1000)
    ours = model(named, words)
    weights = tensor_files.Stored(saved(ours, words, tmp_path / "checkpoint-1", ranks=2) / "model")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(ours.config)
    ours._weight_conversions = empty._weight_conversions = converters
    written = Written.of(empty, dict(empty.named_parameters()))
    wanted = revert_weight_conversion(ours, dict(ours.named_parameters()))
    assert [*written.shapes] == [*wanted]
    for name, tensor in wanted.items():
        found = torch.zeros_like(tensor)
        for (first, size), block in written.blocks(name, weights):
            found[tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))] = block
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_in_another_dtype(dtype: str, tmp_path: Path, named: Callable[..., ModelConfig], words: Any) -> None:
    ours = model(named, words, "gpt2-tiny")
    source = saved(ours, words, tmp_path / "checkpoint-1", ranks=2)
    export(source / "model", tmp_path / "final", {}, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    for (name, p), q in zip(ours.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.to(q.dtype), q), name


def test_what_is_streamed_is_as_the_library_writes_it(tmp_path: Path) -> None:
    """Every dtype, a scalar and an empty tensor, the narrow ones before the wide ones."""
    tensors = {
        f"{dtype}-{shape}": torch.arange(6).resize_(shape).to(dtype)
        for dtype in tensor_files.NAMES
        for shape in ((), (0, 3), (3,), (2, 3))
    }
    narrow_first = dict(sorted(tensors.items(), key=lambda item: item[1].dtype.itemsize))
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in narrow_first.items()}
    tensor_files.stream(
        tmp_path / "a.safetensors",
        specs,
        lambda name: tensors[name].split(1) if tensors[name].dim() else [tensors[name]],
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            again = file.get_tensor(name)
            assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(tensor_files.as_bytes(again), tensor_files.as_bytes(tensor)), name
    read = tensor_files.Stored(tmp_path)
    assert read.specs == specs


def test_what_differs_when_read_again_leaves_nothing(
    tmp_path: Path, named: Callable[..., ModelConfig], words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(model(named, words), words, tmp_path / "run" / "checkpoint-1") / "model"
    final = tmp_path / "out" / "final"
    with pytest.raises(ShoalError, match=r"loaded again.*apart"):
        export(source, final, {}, check=partial(check_same_logits, model(named, words, seed=3)))
    write = tensor_files.stream

    def bit_rot(path: Path, *args: Any) -> None:
        write(path, *args)
        weights = bytearray(path.read_bytes())
        weights[-1] ^= 0x40
        path.write_bytes(weights)

    monkeypatch.setattr(exporting.tensor_files, "stream", bit_rot)
    with pytest.raises(ShoalError, match=r"differs when read again"):
        export(source, final, {})
    assert not list((tmp_path / "out").iterdir())


def test_an_export_writes_over_nothing(tmp_path: Path, named: Callable[..., ModelConfig], words: Any) -> None:
    """What lies at its place is refused, and a folder with a name as if an export were under way stays."""
    source = saved(model(named, words), words, tmp_path / "run" / "checkpoint-1") / "model"
    mine = [tmp_path / "out" / folder / "mine" for folder in ("final", ".other.new", ".other.old")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    with pytest.raises(UserError, match="final: it exists"):
        export(source, tmp_path / "out" / "final", {})
    export(source, tmp_path / "out" / "other", {})
    assert all(path.read_text() == "mine" for path in mine)


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, named: Callable[..., ModelConfig], words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(model(named, words), words, tmp_path / "run" / "checkpoint-1") / "model"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_card_text", full)
    with pytest.raises(ShoalError, match="No space left"):
        export(source, tmp_path / "out" / "final", {})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("no JSON", "config.json"),
        ('{"model_type": "nothere"}', "config.json"),
        ('{"model_type": "t5"}', "config.json"),
        (None, "config.json"),
    ],
)
def test_what_is_no_model_is_refused(
    config: str | None, found: str, tmp_path: Path, named: Callable[..., ModelConfig], words: Any
) -> None:
    source = saved(model(named, words), words, tmp_path / "checkpoint-1") / "model"
    (source / "config.json").unlink()
    if config is not None:
        (source / "config.json").write_text(config)
    with pytest.raises(UserError, match=found) as caught:
        export(source, tmp_path / "final", {})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "final").exists()


def test_every_family_of_models_is_exported_as_what_it_is(tmp_path: Path, words: Any) -> None:
    """By the class that its configuration names: no other family's class would have all of its tensors."""
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("masked-lm", "sequence-classification", "token-classification", "question-answering"):
        family = families.FAMILIES[name]
        ours = family.auto.from_config(AutoConfig.for_model("bert", intermediate_size=48, **sizes))
        ours.config.architectures = [type(ours).__name__]
        source = saved(ours, words, tmp_path / name / "checkpoint-1")
        export(source / "model", tmp_path / name / "final", {})
        loaded, report = family.auto.from_pretrained(tmp_path / name / "final", output_loading_info=True)
        assert not any(report.values()), report
        assert type(loaded) is type(ours)
        for (key, p), q in zip(ours.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(p, q), key
        assert f"pipeline_tag: {family.pipeline_tag}" in (tmp_path / name / "final/README.md").read_text()
