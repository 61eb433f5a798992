"""A model and data sets of a caller's own, and what `shoal.Trainer` makes of them on one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import shoal

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS = {
    "max_steps": 5, "global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "threads": 1,
    "precision": "64-true", "eval_steps": 2, "save_steps": 3, "device": "cpu",
}  # fmt: skip


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    """Rows of one length; of a language model some labels count nothing, of a classifier each row has one."""
    draw = np.random.default_rng(count)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, 50, 9)
        labels = np.where(draw.random(9) < 0.3, -100, ids) if kind == "llama" else int(ids[0] > ids[1])
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows


class Plain(nn.Module):
    """A module that knows nothing of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).mean(1))


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "plain":
        return Plain()
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, intermediate_size=32))
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **none, intermediate_size=32, num_labels=2)
    return AutoModelForSequenceClassification.from_config(config)


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: int) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(kind: str, folder: str, callbacks: Any = (), **settings: Any) -> shoal.Trainer:
    return shoal.Trainer(
        model_of(kind),
        SETTINGS | {"output_dir": folder} | settings,
        train_dataset=rows_of(kind, 21),
        eval_dataset=rows_of(kind, 13),
        compute_loss_func=cross_entropy if kind == "plain" else None,
        compute_metrics=None if kind == "llama" else accuracy,
        callbacks=callbacks,
    )


def weights(folder: Path | str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")
