"""Small Hugging Face models as a task: packed windows, with a boundary between documents in every place."""

from dataclasses import dataclass

import numpy as np
import torch
from laws.rows import IGNORED, RowsTask
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from shoal.models import attention, norm
from shoal.models.isolation import PADDING, packed_inputs, padded_inputs
from shoal.models.loss import summed_cross_entropy
from shoal.models.lstm import LstmConfig, LstmForCausalLM

VOCABULARY = 37


class Packed:
    """Window i has a boundary at i modulo its length, a few more, and at its end up to 3 tokens without a label."""

    def __init__(self, size: int, length: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.tokens = draw.integers(0, VOCABULARY, (size, length))
        starts = draw.random((size, length)) < 0.05
        starts[np.arange(size), np.arange(size) % length] = True
        self.documents = starts.cumsum(axis=1)
        follows = self.documents[:, 1:] == self.documents[:, :-1]
        self.labels = np.full((size, length), IGNORED)
        self.labels[:, :-1] = np.where(follows, self.tokens[:, 1:], IGNORED)
        for row, unlabelled in zip(self.labels, draw.integers(0, 4, size), strict=True):
            row[length - unlabelled :] = IGNORED

    def __len__(self) -> int:
        return len(self.tokens)

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        return np.where(ids < 0, 0, (self.labels != IGNORED).sum(axis=1)[ids])

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        there = (ids >= 0)[:, None]
        labels = np.where(there, self.labels[ids], IGNORED)
        columns = {"input_ids": self.tokens[ids], "labels": labels, "documents": self.documents[ids]}
        return {name: torch.from_numpy(column) for name, column in columns.items()}


@dataclass(frozen=True)
class PackedTask(RowsTask):
    """A language model on packed windows; `kind` is the type of the model."""

    kind: str = "llama"
    length: int = 19
    packing: bool = True  # else each row is one document, with padding behind it

    def model(self) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        made = model_of(self.kind, self.dropout)
        attention.use_fastest(made)
        norm.use_fastest(made)
        return made.train()

    def samples(self, split: str) -> Packed:
        made = Packed(self.size if split == "train" else 17, self.length, seed=len(split))
        if not self.packing:
            last = (made.labels != IGNORED).cumsum(axis=1).argmax(axis=1)  # that predicts something
            made.documents = np.where(np.arange(self.length) <= last[:, None], 0, PADDING)
        return made

    def loss(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        if self.packing:
            packed = packed_inputs(inputs["input_ids"], inputs["documents"], inputs.get("position_ids"))
        else:
            packed = padded_inputs(inputs["input_ids"], inputs["documents"])
        return summed_cross_entropy(model, packed, inputs["labels"])


def model_of(kind: str, dropout: float) -> PreTrainedModel:
    """Two layers; queries of a llama share keys, a gpt2's embedding is its head. The others cannot be cut."""
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "lstm":
        return LstmForCausalLM(LstmConfig(**sizes))
    if kind == "gpt2":
        drops = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(**sizes, n_head=4, **drops, **none))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": dropout}
    sizes |= {"intermediate_size": 48}
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(sliding_window=8, **sizes, **heads, **none))
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **none))
    if kind == "eager":
        made.set_attn_implementation("eager")
    if kind == "mixing":  # a token knows of the one before it without attention
        made.model.embed_tokens.register_forward_hook(lambda _, ids, found: found + found.roll(1, dims=1))
    return made
