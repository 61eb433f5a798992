"""A classifier of a caller's own data: a small BERT learns whether most numbers of a row are below 10.

`python examples/trainer.py` and `torchrun --nproc-per-node 2 examples/trainer.py` train the same model.
"""

import random

import shoal  # isort: skip  (first: it keeps quiet what transformers imports)
import torch
from transformers import BertConfig, BertForSequenceClassification


def rows(count: int, seed: int) -> list[dict]:
    """Rows of 11 numbers below 20."""
    draw = random.Random(seed)
    made = [[draw.randrange(20) for _ in range(11)] for _ in range(count)]
    return [{"input_ids": ids, "labels": int(sum(n < 10 for n in ids) > 5)} for ids in made]


def accuracy(found: shoal.EvalPrediction) -> dict[str, float]:
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}


torch.manual_seed(0)
config = BertConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
)
trainer = shoal.Trainer(
    BertForSequenceClassification(config),
    {
        "max_steps": 100,
        "global_batch_size": 32,
        "learning_rate": 3e-3,
        "output_dir": "runs/classifier",
        "overwrite_output_dir": True,
    },
    train_dataset=rows(1000, seed=0),
    eval_dataset=rows(200, seed=1),
    compute_metrics=accuracy,
)
summary = trainer.train()
print(f"accuracy {summary['eval/accuracy']:.3f}")
