"""The job with the Hugging Face Trainer: as the others have it, or with nothing but its own defaults."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.peers import common


class Recorder(TrainerCallback):
    """Tells the record of each step."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics

    def on_train_begin(self, *state: Any, **more: Any) -> None:
        """The clock starts where the other loops start it."""
        self.record = common.Record(self.metrics)

    def on_step_end(self, *state: Any, **more: Any) -> None:
        """A step is over."""
        self.record.step()


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    output = str(job.metrics.parent / "trainer")
    if job.defaults:
        settings = TrainingArguments(output, per_device_train_batch_size=job.batch)
    else:
        settings = TrainingArguments(
            output,
            per_device_train_batch_size=job.batch,
            use_cpu=True,
            bf16=job.precision == "bf16",
            learning_rate=1e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
        )
    trainer = Trainer(
        common.llama(), settings, train_dataset=common.Windows(job.windows), callbacks=[Recorder(job.metrics)]
    )
    trainer.train()


if __name__ == "__main__":
    main()
