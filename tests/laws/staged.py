"""Tiny models of transformers on the rows of `RowsTask`: what is cut by its layers needs some."""

from dataclasses import dataclass

import numpy as np
import torch
from laws.rows import IGNORED, Rows, RowsTask
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPE = {"vocab_size": 37, "max_position_embeddings": 16, "hidden_size": 32, "num_attention_heads": 4}


class Windows(Rows):
    """Rows that are filled up: every micro-batch has the same shape."""

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        narrow = super().collate(ids)
        more = self.tokens.shape[1] - 1 - narrow["tokens"].shape[1]
        filler = {"tokens": 0, "labels": IGNORED}
        return {name: F.pad(tensor, (0, more), value=filler[name]) for name, tensor in narrow.items()}


@dataclass(frozen=True)
class ModelTask(RowsTask):
    """`kind` is "llama" or "gpt2" (tied, dropout everywhere). Rows may be `filled` up."""

    layers: int = 4
    filled: bool = False

    def samples(self, split: str) -> Rows:
        rows = super().samples(split)
        return Windows(self.size, self.length, seed=len(split)) if self.filled else rows

    def model(self) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        shape = {**SHAPE, "num_hidden_layers": self.layers, "bos_token_id": None, "eos_token_id": None}
        if self.kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, tie_word_embeddings=False))
        drop = {name: self.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        return GPT2LMHeadModel(GPT2Config(**shape, **drop))

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        scores = model(input_ids=inputs["tokens"], use_cache=False).logits
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.cross_entropy(
            wide.flatten(0, 1), inputs["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
