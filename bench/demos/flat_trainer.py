"""The run of the flat demonstration in the Hugging Face Trainer, as its documents have it: one rank of it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments


class Rows(Dataset[dict[str, Tensor]]):
    """Rows filled up with -1, of which no loss is taken."""

    def __init__(self, file: Path) -> None:
        self.ids = torch.from_numpy(np.load(file, allow_pickle=False))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        real = ids >= 0
        return {
            "input_ids": ids.clamp(min=0),
            "attention_mask": real.long(),
            "labels": ids.where(real, torch.tensor(-100)),
        }


def main(
    rows: Path, folder: Path, steps: int, micro_batch: int, accumulation: int, model: dict[str, Any]
) -> None:
    """Train, and write the loss that the Trainer logs of each step."""
    torch.manual_seed(42)
    config = AutoConfig.for_model(**model, use_cache=False)
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        use_cpu=True,
        learning_rate=3e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(AutoModelForCausalLM.from_config(config), settings, train_dataset=Rows(rows))
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    rows, folder, steps, micro_batch, accumulation, model = sys.argv[1:]
    main(Path(rows), Path(folder), int(steps), int(micro_batch), int(accumulation), json.loads(model))
