"""Every layout runs any function of the model, not the loss alone; results of any shape are those of one process."""

from typing import Any

import numpy as np
import pytest
import torch
from laws.packed import PackedTask
from laws.pool import Pool
from laws.rows import IGNORED
from laws.worlds import run_of
from torch import Tensor

from shoal.models.heads import logits
from shoal.models.isolation import packed_inputs
from shoal.wire.mesh import Mesh

TASK = PackedTask("llama", dropout=0.1)
STEPS = {"precision": "64-true", "global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"dp_shard": 2, "zero_stage": 1},
    "zero3": {"dp_shard": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
    "cp": {"cp": 2},
}


def of_rows(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of each row, the log-probability of its labels and how many the model gets right: [rows, 2]."""
    packed = packed_inputs(inputs["input_ids"], inputs["documents"], inputs.get("position_ids"))
    scores, labels = logits(model, packed).log_softmax(-1), inputs["labels"]
    known = labels != IGNORED
    found = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    right = scores.argmax(-1) == labels
    return torch.stack([(found * known).sum(1), (right & known).sum(1).to(found.dtype)], dim=1)


def called(mesh: Mesh, **settings: Any) -> list[np.ndarray | None]:
    """What two calls, on two micro-batches, give this rank."""
    run = run_of(mesh, "allreduce", TASK, **STEPS, **settings)
    placed, batch = run.replica.placed, run.batches.at(0)
    placed.model.eval()
    placed.before_forward()
    with torch.no_grad():
        found = [placed.call(of_rows, batch.micro_batch(v)) for v in range(2)]
    placed.after_evaluation()
    return [None if each is None else each.numpy() for each in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_function_other_than_the_loss(pool: Pool, layout: str) -> None:
    (alone,) = pool.world(1, called)
    on_ranks = pool.world(2, called, **LAYOUTS[layout])
    for v, expected in enumerate(alone):
        assert expected is not None
        assert expected.shape == (2, 2)
        given = [found[v] for found in on_ranks if found[v] is not None]
        assert len(given) == (1 if layout in ("tp", "pp") else 2)
        results = [sum(given)] if layout == "cp" else given  # ranks of a window hold terms of a sum
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=1e-11)
