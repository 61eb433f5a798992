"""Small inputs on which trainers have failed, each made anew in the folder of its test."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LINES = [f"Page {i} says {i * 7}, and the tide goes out with net {i}." for i in range(40)]
RECIPE = """\
model: {name: llama-tiny, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
        intermediate_size: 48}
data: {path: t.txt, vocab_size: 300, sequence_length: 32}
train: {max_steps: 2, global_batch_size: 4, per_device_train_batch_size: 2}
log: {logging_steps: 1}
launch: {nproc_per_node: 1}
"""
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def common(folder: Path) -> None:
    """A recipe, and the text and rows that it and others name."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "t.txt").write_text("\n\n".join(LINES * 8))
    (folder / "t.jsonl").write_text(rows(LINES * 8))


def rows(texts: list[str]) -> str:
    """Texts as JSONL."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def tokenizer(folder: Path, *, gap: int = 0, special: tuple[str, ...] = ()) -> None:
    """Bytes as tokens behind three special ones; `gap` ids are left out before the last byte."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {character: 3 + i for i, character in enumerate(alphabet)}
    vocabulary[alphabet[-1]] += gap
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=list(special),
    )  # fmt: skip
    fast.save_pretrained(folder)


def model(folder: Path, kind: str, **options: Any) -> None:
    """A Hugging Face folder of this type, tiny and at random, with its tokenizer."""
    torch.manual_seed(0)
    known = CONFIG_MAPPING[kind]
    config = known(
        **{name: size for name, size in SIZES.items() if options.get(name, size) is not None} | options
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(folder)


def say_of_itself(folder: Path, **facts: Any) -> None:
    """Change what the config.json of a model folder says."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
