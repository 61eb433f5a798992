"""Causal language modelling: predict each next token of packed windows."""

import math
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.data import prepare, tokenizer
from shoal.data.shards import Split, TokenStream
from shoal.errors import UserError
from shoal.models.export import check_same_logits, describe, export
from shoal.models.heads import has_plain_head
from shoal.models.isolation import check_isolation, packed_inputs
from shoal.models.loading import check_name, load
from shoal.models.loss import IGNORED, summed_cross_entropy
from shoal.models.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM:
    """Windows of `sequence_length` tokens cut from the documents laid end to end; every token is a label once."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder

    @staticmethod
    def prepare(config: RunConfig, verbose: bool = False) -> Path:
        """Documents to token shards in the cache, with the model's own tokenizer where it has one."""
        check_name(config.model.name)
        chosen = config.data.tokenizer
        if chosen != "auto" or config.model.name in PRESETS:
            return prepare.prepare(config.data, "train" if chosen == "auto" else chosen, verbose=verbose)
        try:
            return prepare.prepare(config.data, config.model.name, verbose=verbose)
        except UserError as error:
            if not error.asked.startswith("--tokenizer"):
                raise
            change = f"name a folder, a hub name or a preset ({', '.join(PRESETS)}), or give --tokenizer"
            raise UserError(f"--model {config.model.name}", error.found, change) from error

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the shards."""
        return tokenizer.load(str(self.folder / "tokenizer"))

    def model(self) -> "PreTrainedModel":
        """The causal language model of the configuration; refused if packed documents see each other in it."""
        model = load(
            self.config.model,
            vocab_size=tokenizer.vocab_size(self.tokenizer),
            sequence_length=self.config.data.sequence_length,
            tokenizer=self.tokenizer,
            seed=self.config.train.seed,
        )
        check_isolation(model)
        self._chunked = has_plain_head(model)
        return model

    def samples(self, split: Split) -> "Windows":
        """The windows of a split."""
        return Windows(TokenStream(self.folder, split), self.config.data.sequence_length)

    def loss(self, model: "PreTrainedModel", inputs: dict[str, Tensor]) -> Tensor:
        """Summed cross entropy over the labels, logits never whole in memory."""
        packed = packed_inputs(inputs["input_ids"], inputs["documents"], inputs.get("position_ids"))
        return summed_cross_entropy(model, packed, inputs["labels"], chunked=self._chunked)

    def metrics(self, loss_sum: float, labels: int) -> dict[str, float]:
        """Loss in nats per token, perplexity, and bits per byte of the documents' UTF-8."""
        loss = loss_sum / labels
        text_bytes = TokenStream(self.folder, "eval").bytes
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700)),
            "eval/bits_per_byte": loss_sum / math.log(2) / text_bytes,
            "eval/tokens": labels,
        }

    def example(self, model: Any) -> str | None:
        """A few lines that go on from the first words of held-out documents, or of others if there are none."""
        stream = TokenStream(self.folder, "eval")
        if not stream.tokens:
            stream = TokenStream(self.folder, "train")
        start, _ = stream.read(0, min(stream.tokens, 12))
        torch.manual_seed(self.config.train.seed)
        prompt = torch.from_numpy(start)[None].to(model.device)
        with torch.no_grad():
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=True, temperature=0.8,
                top_k=50, pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def describe(self, model: "PreTrainedModel", folder: Path) -> None:
        """Configuration and tokenizer, beside the weights."""
        describe(model, self.tokenizer, folder)

    def export(
        self, checkpoint: Path, folder: Path, summary: dict[str, Any], model: "PreTrainedModel | None"
    ) -> None:
        """A Hugging Face folder with tokenizer and model card; with `model`, loaded again and compared."""
        check = None if model is None else partial(check_same_logits, model)
        export(checkpoint / "model", folder, summary, check=check)


class Windows:
    """Sample i holds the tokens [i*T, i*T + T) of a split, and as labels those one further on.

    Nothing crosses a document: the first token of one is no label of the one before it, unless the tokenizer has
    a single boundary token, which then ends one document as it begins the next. The last window is filled up
    with labels that count nothing.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream = stream
        self.length = sequence_length
        self.starts = stream.starts

    def __len__(self) -> int:
        return max(0, -(-(self.stream.tokens - 1) // self.length))

    def label_counts(self, ids: np.ndarray) -> np.ndarray:
        """How many labels each window has: from the index of the documents, no token is read."""
        first = ids * self.length
        last = np.minimum(first + self.length, self.stream.tokens - 1)
        counts = last - first
        if not self.stream.shared_boundary:
            counts -= np.searchsorted(self.starts, last, "right") - np.searchsorted(
                self.starts, first, "right"
            )
        return np.where(ids < 0, 0, counts)

    def collate(self, ids: np.ndarray) -> dict[str, Tensor]:
        """`input_ids`, `labels` and the ordinals of the tokens' `documents`: int64 [rows, T] each."""
        rows = [self._row(int(i)) for i in ids]
        names = ("input_ids", "labels", "documents")
        return {
            name: torch.from_numpy(np.stack(column))
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }

    def _row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        documents = np.zeros(self.length, dtype=np.int64)
        if i >= 0:
            tokens, owners = self.stream.read(
                i * self.length, min((i + 1) * self.length + 1, self.stream.tokens)
            )
            n = len(tokens) - 1
            inputs[:n], documents[:n], documents[n:] = tokens[:-1], owners[:-1], owners[-1] + 1
            crosses = (owners[1:] != owners[:-1]) & (not self.stream.shared_boundary)
            labels[:n] = np.where(crosses, IGNORED, tokens[1:])
        return inputs, labels, documents
