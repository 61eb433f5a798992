"""`diloco` beside an independent one: torchft's, whose exchanges are handed to a process group of these ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from laws.pool import Pool
from laws.published import SETTINGS, followed
from laws.rows import IGNORED, RowsTask
from laws.worlds import Arrays, first_difference
from torch import Tensor
from torch.nn import functional as F

from shoal.data.batches import Batches
from shoal.optim import optimizers
from shoal.wire.mesh import Mesh

EVERY, RATE, MOMENTUM = 5, 0.7, 0.9


class Meeting:
    """What torchft's DiLoCo asks of its manager, for ranks that are all there."""

    _use_async_quorum = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def allreduce(self, tensor: Tensor, should_quantize: bool = False) -> Any:
        dist.all_reduce(tensor, group=self.group)
        tensor /= self.group.size()
        return SimpleNamespace(wait=lambda: None)

    def should_commit(self) -> bool:
        return True

    def current_step(self) -> int:
        return 0

    def start_quorum(self) -> None: ...
    def allow_state_dict_read(self) -> None: ...
    def disallow_state_dict_read(self) -> None: ...
    def register_state_dict_fn(self, *args: Any) -> None: ...


def by_torchft(mesh: Mesh, task: RowsTask, optimizer: str) -> list[Arrays]:
    """Every parameter of this rank after each step."""
    from torchft.local_sgd import DiLoCo

    samples = task.samples("train")
    rows, each, seed = (
        SETTINGS[name] for name in ("global_batch_size", "per_device_train_batch_size", "seed")
    )
    order = Batches(samples, seed=seed, global_batch_size=rows, micro_batch_size=each)
    model = task.model().double()
    (inner,) = optimizers.build(
        optimizer,
        list(model.named_parameters()),
        optimizers.Hyperparameters(SETTINGS["learning_rate"], SETTINGS["weight_decay"]),
    )
    outer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True)
    history = []
    with DiLoCo(Meeting(mesh.group), [model], inner, outer, sync_every=EVERY):
        for step in range(SETTINGS["max_steps"]):
            micro_batches = [samples.collate(ids) for ids in order.at(step).ids]
            count = len(micro_batches) // mesh.world_size
            share = micro_batches[mesh.rank * count : (mesh.rank + 1) * count]
            labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in share)
            inner.zero_grad()
            for batch in share:
                scores, target = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
                loss = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
                (loss / labels).backward()
            inner.step()
            history.append({n: p.detach().numpy().copy() for n, p in model.named_parameters()})
    return history


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_torchfts(pool: Pool, tmp_path: Path, optimizer: str) -> None:
    task = RowsTask("tied")
    chosen = {"strategy": "diloco", "sync_every": EVERY, "optim": optimizer, "output_dir": str(tmp_path)}
    ours = pool.world(3, followed, task, **SETTINGS | chosen)
    theirs = pool.world(3, by_torchft, task, optimizer)
    for one, other in zip(theirs, ours, strict=True):
        assert first_difference(one, other, 1e-10) is None
