"""Causal language modelling: predict each next token of packed windows, or of rows of one document."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.config.presets import PRESETS
from shoal.data import prepare, tokenizer
from shoal.data.shards import Split, TokenStream
from shoal.errors import UserError
from shoal.models import proof
from shoal.models.export import check_same_logits, describe, export
from shoal.models.isolation import PADDING, packed_inputs, padded_inputs, real_tokens
from shoal.models.loading import check_name, is_random, load
from shoal.models.loss import IGNORED, own_loss, summed_cross_entropy
from shoal.models.pretrained import remarks
from shoal.tasks.base import Task
from shoal.tasks.surroundings import Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[[dict[str, Tensor]], Tensor]
Row = tuple[np.ndarray, ...]  # input_ids, labels, documents: int64 [T] each
ROUTER = "(--model.output_router_logits false, for a router's)"


def prepare_text(config: RunConfig, verbose: bool = False) -> Path:
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


@cache
def _tokenizer_in(folder: Path) -> Any:
    """The tokenizer that made the shards in a folder."""
    return tokenizer.load(str(folder / "tokenizer"))


def _asked(config: RunConfig) -> str:
    return f"--model {config.model.name}"


class CausalLM(Task):
    """Windows of `sequence_length` tokens cut from the documents laid end to end; every token is a label once."""

    def model(self) -> "PreTrainedModel":
        """The causal language model of the configuration; refused if it cannot be trained as it is asked for."""
        data = self._config.data
        model = load(
            self._config.model,
            vocab_size=tokenizer.vocab_size(_tokenizer_in(self._folder)),
            sequence_length=data.sequence_length,
            tokenizer=_tokenizer_in(self._folder),
            seed=self._config.train.seed,
        )
        tokens = proof.trial_tokens(model, data.sequence_length)
        with proof.trial(_asked(self._config), proof.remedy(data.packing)):
            self._how = proof.choose_loss(model, _asked(self._config))
            proof.check_hidden(model, _asked(self._config), tokens, data.packing, torch.float32)
        self._check_layout()
        return model

    def _check_layout(self) -> None:
        """A loss that the model adds to cross entropy is one of all its layers and all tokens of a micro-batch."""
        layout, smoothing = self._config.layout, self._config.train.label_smoothing
        if smoothing and (self._how == "own" or layout.tp > 1):
            found = (
                "--tp cuts the vocabulary"
                if layout.tp > 1
                else f"{self._config.model.name} computes its own loss"
            )
            raise UserError(f"--label-smoothing {smoothing:g}", found, "leave it out")
        for flag, size in {"--tp": layout.tp, "--pp": layout.pp, "--cp": layout.cp}.items():
            if self._how == "own" and size > 1:
                found = f"{self._config.model.name} adds a loss of its own, which no part of it can compute"
                raise UserError(f"{flag} {size}", found, f"leave it out, or turn that loss off {ROUTER}")

    def samples(self, split: Split) -> "Windows | Rows":
        """The windows of a split, or its rows of one document."""
        kind = Windows if self._config.data.packing else Rows
        return kind(TokenStream(self._folder, split), self._config.data.sequence_length)

    def loss(self, model: "PreTrainedModel", inputs: dict[str, Tensor]) -> Tensor:
        """Summed cross entropy over the labels; in training with what the model itself adds to it."""
        ids, documents, positions = inputs["input_ids"], inputs["documents"], inputs.get("position_ids")
        if self._config.data.packing or positions is not None:
            given = packed_inputs(ids, documents, positions)
        else:
            given = padded_inputs(ids, documents)
        if self._how == "own" and model.training:
            return own_loss(model, given | {"attention_mask": real_tokens(documents)}, inputs["labels"])
        smoothing = self._config.train.label_smoothing if model.training else 0.0
        chunked = self._how == "chunked"
        return summed_cross_entropy(model, given, inputs["labels"], chunked=chunked, smoothing=smoothing)

    def metrics(self, sums: Sequence[float], labels: int, predictions: Sequence[Any]) -> dict[str, float]:
        """Loss in nats per token, perplexity, and bits per byte of the documents' UTF-8."""
        (loss_sum,) = sums
        loss = loss_sum / labels
        text_bytes = TokenStream(self._folder, "eval").bytes
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700)),
            "eval/bits_per_byte": loss_sum / math.log(2) / text_bytes,
            "eval/tokens": labels,
        }


class CausalSurroundings(Surroundings):
    """For a causal language model of Hugging Face."""

    def check(self, model: "PreTrainedModel", loss: Loss | None, dtype: torch.dtype) -> None:
        """Prove again that documents do not see each other, for the placed model and windows of full length.

        Compares hidden states; where the model is cut, the `loss` that its ranks compute together.
        """
        data = self._config.data
        with proof.trial(_asked(self._config), proof.remedy(data.packing)):
            if loss is None:
                proof.check_hidden(model, _asked(self._config), data.sequence_length, data.packing, dtype)
            else:
                proof.check_loss(loss, model, _asked(self._config), data.sequence_length, data.packing, dtype)

    def weights(self) -> str:
        return "" if is_random(self._config.model) else f"from {self._config.model.name}"

    def remarks(self) -> list[str]:
        return remarks(self._config.model.name)

    def example(self, model: Any) -> str | None:
        """A few lines that go on from the first words of held-out documents, or of others if there are none."""
        stream = TokenStream(self._folder, "eval")
        if not stream.tokens:
            stream = TokenStream(self._folder, "train")
        start, _ = stream.read(0, min(stream.tokens, 12))
        words = _tokenizer_in(self._folder)
        torch.manual_seed(self._config.train.seed)
        prompt = torch.from_numpy(start)[None].to(model.device)
        with torch.no_grad():
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=True, temperature=0.8,
                top_k=50, pad_token_id=words.pad_token_id or words.eos_token_id,
            )  # fmt: skip
        return str(words.decode(tokens[0], skip_special_tokens=True))

    def describe(self, model: "PreTrainedModel", folder: Path) -> None:
        """Configuration and tokenizer, beside the weights."""
        describe(model, _tokenizer_in(self._folder), folder)

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

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        """How many labels each window has: from the index of the documents, no token is read."""
        first = ids * self.length
        last = np.minimum(first + self.length, self.stream.tokens - 1)
        counts = last - first
        if not self.stream.shared_boundary:
            counts -= np.searchsorted(self.starts, last, "right") - np.searchsorted(
                self.starts, first, "right"
            )
        return np.where(ids < 0, 0, counts)

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        """`input_ids`, `labels` and the ordinals of the tokens' `documents`: int64 [rows, T] each."""
        return _columns([self._row(int(i)) for i in ids])

    def _row(self, i: int) -> Row:
        inputs, labels, documents = _blank(self.length)
        if i >= 0:
            tokens, owners = self.stream.read(
                i * self.length, min((i + 1) * self.length + 1, self.stream.tokens)
            )
            n = len(tokens) - 1
            inputs[:n], documents[:n] = tokens[:-1], owners[:-1]
            crosses = (owners[1:] != owners[:-1]) & (not self.stream.shared_boundary)
            labels[:n] = np.where(crosses, IGNORED, tokens[1:])
        return inputs, labels, documents


class Rows:
    """Sample i holds up to T tokens of one document, and as labels those one further on; the rest is padding.

    A document longer than T goes on in the next rows. Labels are those of `Windows`, each once. Costs 16 bytes
    of memory for each document.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream = stream
        self.length = sequence_length
        last = stream.tokens - 1 if stream.shared_boundary else stream.tokens
        self._ends = np.append(stream.starts[1:], last)  # of what a document predicts from, or one further
        own = self._labels(np.arange(len(stream.starts)))
        self._rows = np.cumsum(-(-own // sequence_length))  # those of all documents up to each

    def _labels(self, documents: np.ndarray) -> np.ndarray:
        counts = self._ends[documents] - self.stream.starts[documents]
        return np.maximum(0, counts if self.stream.shared_boundary else counts - 1)

    def _places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row the document, how many labels of it come before, and how many there are here."""
        documents = np.searchsorted(self._rows, ids, "right")
        own = self._labels(documents)
        before = self.length * (ids - (self._rows[documents] - -(-own // self.length)))
        return documents, before, np.minimum(self.length, own - before)

    def __len__(self) -> int:
        return int(self._rows[-1]) if len(self._rows) else 0

    def label_counts(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> np.ndarray:
        """How many labels each row has: from the index of the documents, no token is read."""
        return np.where(ids < 0, 0, self._places(np.maximum(ids, 0))[2])

    def collate(self, ids: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, Tensor]:
        """As `Windows.collate`."""
        return _columns([self._row(i) for i in ids])

    def _row(self, i: int) -> Row:
        inputs, labels, documents = _blank(self.length)
        if i >= 0:
            document, before, count = (int(each) for each in self._places(np.asarray(i)))
            start = int(self.stream.starts[document]) + before
            tokens, _ = self.stream.read(start, start + count + 1)
            inputs[:count], labels[:count], documents[:count] = tokens[:-1], tokens[1:], document
        return inputs, labels, documents


def _blank(length: int) -> Row:
    """Padding alone."""
    return tuple(np.full(length, value, dtype=np.int64) for value in (0, IGNORED, PADDING))


def _columns(rows: list[Row]) -> dict[str, Tensor]:
    names = ("input_ids", "labels", "documents")
    columns = zip(*rows, strict=True)
    return {name: torch.from_numpy(np.stack(column)) for name, column in zip(names, columns, strict=True)}
