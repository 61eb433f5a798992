"""Exact evaluation: every row once, and the same number on any worker count."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.data.batches import ABSENT, Samples
from shoal.layouts.base import Function, PlacedModel
from shoal.tensors.precision import Policy
from shoal.training.run import Run

ASK_EVERY = 4  # micro-batches of each, after which all ask each other whether to stop


@dataclass(frozen=True)
class Evaluators:
    """Those who evaluate together: this one's place among `size`, and how they add up what each has found.

    All call `agree` equally often. Groups of `in_step` neighbours measure equally often, the last time perhaps a
    micro-batch without samples.
    """

    index: int = 0
    size: int = 1
    agree: Callable[[Tensor], Tensor] = lambda numbers: numbers
    in_step: int = 1


@torch.no_grad()
def evaluate(
    placed: PlacedModel,
    loss: Function,
    samples: Samples,
    *,
    micro_batch_size: int,
    among: Evaluators,
    policy: Policy,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """The summed loss over all of `samples` and the number of their labels.

    Each takes every size-th micro-batch; the sums of the micro-batches are added up in their order, so the result
    does not depend on who computed them. What no rank has reported, because one has died, each computes again for
    itself. None if `stop()` came true on any rank: all leave together, at most ASK_EVERY micro-batches later.
    """
    rows = -(-len(samples) // micro_batch_size)
    rows += -rows % among.in_step  # the last ones without samples: as many for each of those in step
    micro_batches = np.full((rows, micro_batch_size), ABSENT, dtype=np.int64)
    micro_batches.flat[: len(samples)] = np.arange(len(samples))

    def measure(v: int) -> float:
        inputs = {k: t.to(device) for k, t in samples.collate(micro_batches[v]).items()}
        with policy.autocast(device):
            found = placed.call(loss, inputs)
            return 0.0 if found is None else float(found.item())

    def stopping() -> bool:
        return bool(among.agree(torch.tensor([float(stop())], dtype=torch.float64)) > 0)

    table = torch.zeros(2, len(micro_batches), dtype=torch.float64)  # sums, and which are known
    model = placed.model
    placed.before_forward()
    was_training = model.training
    model.eval()
    stopped = False
    for turn, first in enumerate(range(0, rows, among.size)):  # as many on every rank, whatever its share
        if turn % ASK_EVERY == 0 and stopping():
            stopped = True
            break
        if (v := first + among.index) < rows:
            found = measure(v)
            table[0, v], table[1, v] = found, 1
    stopped = stopped or stopping()
    if not stopped:
        table = among.agree(table.view(-1)).view(2, -1)
        for v in (table[1] == 0).nonzero().flatten().tolist():
            table[0, v] = measure(v)
    model.train(was_training)
    placed.after_evaluation()
    return None if stopped else (table[0].sum().item(), int(samples.label_counts(micro_batches).sum()))


def validate(run: Run, stop: Callable[[], bool]) -> dict[str, float] | None:
    """The task's metrics over the whole "eval" split, {} if it is empty; None if `stop()` came true.

    A rank that evaluates alone, stopped before the last step, gives {}: it takes steps until the strategy says
    after which one all stop.
    """
    samples, members = run.task.samples("eval"), run.sync.members
    alone = members.evaluates_alone
    if not len(samples) or (alone and run.mesh.replicate.index):
        return {}
    run.saver.wait_until_read()  # the shared model may overwrite what is being copied
    island = run.replica.island
    among = Evaluators(
        run.mesh.team,
        len(island.teams) if alone else run.mesh.teams,
        island.sum if alone else run.agree,
        in_step=len(island.teams),
    )
    with run.sync.shared_model(run.replica):
        run.saver.keep_model(run.progress.step)
        measured = evaluate(
            run.replica.placed,
            run.task.loss,  # never the compiled one: a second graph would cost more than it saves
            samples,
            micro_batch_size=run.batches.shape[1],
            among=among,
            policy=run.replica.policy,
            device=run.mesh.device,
            stop=(lambda: stop() or members.hears_wish) if alone else stop,
        )
    run.lap()  # the next step does not pay for this
    if measured is None:
        return {} if alone and run.progress.step < run.total_steps else None
    return run.task.metrics(*measured)
