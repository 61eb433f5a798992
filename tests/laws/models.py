"""Models as they are on Hugging Face, tiny, on rows of mixed length in which documents end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from laws.rows import IGNORED, Rows, RowsTask
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.models import attention, norm
from shoal.models.isolation import packed_inputs
from shoal.models.loss import summed_cross_entropy

TOKENS = 37  # no number of ranks divides it
SHAPE = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
DROPOUT: dict[str, tuple[str, ...]] = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "t5": ("dropout_rate",),
}


def build(kind: str, dropout: float, layers: int) -> nn.Module:
    """A model of a Hugging Face type; llama and qwen3 have fewer key and value heads, bert and t5 read ahead.

    opt takes its positions beside a mask, and has a product in front of its layers and one behind them.
    """
    rates = dict.fromkeys(DROPOUT.get(kind, ("attention_dropout",)), dropout)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    shape = SHAPE | {"num_hidden_layers": layers}
    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**shape | heads | rates),
        "qwen3": lambda: Qwen3Config(**shape | heads | rates, tie_word_embeddings=True),
        "gpt_neox": lambda: GPTNeoXConfig(**shape, **rates),
        "bert": lambda: BertConfig(**shape, **rates),
        "t5": lambda: T5Config(
            vocab_size=TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, **rates
        ),
        "gpt2": lambda: GPT2Config(**shape, **rates),
        "opt": lambda: OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=16, dropout=dropout, **rates),
    }
    config = configs[kind]()
    types: dict[str, Any] = {"bert": BertForMaskedLM, "t5": T5ForConditionalGeneration}
    model = types[kind](config) if kind in types else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # else biases are zero, and a key's stays so
            p.add_(torch.randn_like(p), alpha=0.02)
    attention.use_fastest(model)
    norm.use_fastest(model)
    return model.train()


@dataclass(frozen=True)
class ModelTask(RowsTask):
    """`RowsTask` with such a model; a token of 0 begins a document."""

    layers: int = 2

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return build(self.kind, self.dropout, self.layers)

    def samples(self, split: str) -> Rows:
        rows = super().samples(split)
        rows.tokens = np.random.default_rng(len(split)).integers(0, TOKENS, rows.tokens.shape)
        return rows

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.kind == "t5":  # the decoder reads what the encoder has read
            tokens, labels = inputs["tokens"], inputs["labels"].flatten()
            read = {"input_ids": inputs.get("encoded", tokens), "decoder_input_ids": tokens}
            logits = model(**read, use_cache=False).logits.flatten(0, 1)
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        packed = packed_inputs(inputs["tokens"], (inputs["tokens"] == 0).cumsum(1))
        return summed_cross_entropy(model, packed, inputs["labels"], chunked=self.kind != "bert")
