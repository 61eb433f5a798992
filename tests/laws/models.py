"""Models as they are on Hugging Face, tiny, on rows of mixed length in which documents end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from laws.rows import Rows, RowsTask
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from shoal.models import attention, norm
from shoal.models.isolation import packed_inputs
from shoal.models.loss import summed_cross_entropy

TOKENS = 37  # no number of ranks divides it
SHAPE = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
DROPOUT: dict[str, tuple[str, ...]] = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


def build(kind: str, dropout: float) -> nn.Module:
    """A model of a Hugging Face type; llama and qwen3 with fewer key and value heads, bert reads both ways."""
    rates = dict.fromkeys(DROPOUT.get(kind, ("attention_dropout",)), dropout)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**SHAPE | heads | rates),
        "qwen3": lambda: Qwen3Config(**SHAPE | heads | rates, tie_word_embeddings=True),
        "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, **rates),
        "bert": lambda: BertConfig(**SHAPE, **rates),
        "gpt2": lambda: GPT2Config(**SHAPE, **rates),
    }
    config = configs[kind]()
    model = BertForMaskedLM(config) if kind == "bert" else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # else biases are zero, and a key's stays so
            p.add_(torch.randn_like(p), alpha=0.02)
    attention.use_fastest(model)
    norm.use_fastest(model)
    return model.train()


@dataclass(frozen=True)
class ModelTask(RowsTask):
    """`RowsTask` with such a model; a token of 0 begins a document."""

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return build(self.kind, self.dropout)

    def samples(self, split: str) -> Rows:
        rows = super().samples(split)
        rows.tokens = np.random.default_rng(len(split)).integers(0, TOKENS, rows.tokens.shape)
        return rows

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        packed = packed_inputs(inputs["tokens"], (inputs["tokens"] == 0).cumsum(1))
        return summed_cross_entropy(model, packed, inputs["labels"], chunked=self.kind != "bert")
