"""Exact evaluation: every row once, and the same number on any worker count."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from shoal.collectives import Wire
from shoal.data.batches import ABSENT, Samples
from shoal.precision import Policy
from shoal.replica import Loss


class Alone:
    """In place of a wire, for a rank that evaluates without the others."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over one rank."""
        return tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Loss,
    samples: Samples,
    *,
    micro_batch_size: int,
    wire: "Wire | Alone",
    policy: Policy,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """The summed loss over all of `samples` and the number of their labels.

    Rank r takes every world_size-th micro-batch; the sums of the micro-batches are added up in their order, so
    the result does not depend on who computed them. None if `stop()` came true on any rank.
    """
    ids = np.full(-(-len(samples) // micro_batch_size) * micro_batch_size, ABSENT, dtype=np.int64)
    ids[: len(samples)] = np.arange(len(samples))
    micro_batches = ids.reshape(-1, micro_batch_size)
    sums = torch.zeros(len(micro_batches) + 1, dtype=torch.float64)  # the last one counts ranks that stopped
    was_training = model.training
    model.eval()
    for v in range(wire.rank, len(micro_batches), wire.world_size):
        if stop():
            sums[-1] = 1
            break
        inputs = {k: t.to(device) for k, t in samples.collate(micro_batches[v]).items()}
        with policy.autocast(device):
            sums[v] = loss(model, inputs).item()
    model.train(was_training)
    wire.sum(sums)
    if sums[-1] > 0:
        return None
    return sums[:-1].sum().item(), int(samples.label_counts(ids).sum())
