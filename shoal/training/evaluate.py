"""Exact evaluation: every row once, and the same numbers and predictions on any worker count."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.data.batches import ABSENT, Samples
from shoal.layouts.base import Function, PlacedModel
from shoal.tasks import predicts
from shoal.tensors.precision import Policy
from shoal.training.model import BuiltModel
from shoal.training.run import Run
from shoal.wire.island import Island
from shoal.wire.mesh import Mesh

ASK_EVERY = 4  # micro-batches of each, after which all ask each other whether to stop
TEXT_CHUNK = (
    2**20
)  # bytes of predictions that travel at once, as 8 bytes each: sums are all that every strategy has

Predict = Callable[[Any, dict[str, Tensor]], Any]  # -> a JSON value for each row
Found = tuple[
    Tensor | None, list[str]
]  # the sums of a micro-batch and its predictions as JSON; of others who report


@dataclass(frozen=True)
class Evaluators:
    """The ranks that evaluate together: the index of this one among `size`, and how they add up their numbers.

    All call `agree` equally often. Groups of `in_step` neighbours measure equally often, the last time perhaps a
    micro-batch without samples.
    """

    index: int = 0
    size: int = 1
    agree: Callable[[Tensor], Tensor] = lambda numbers: numbers
    in_step: int = 1


@dataclass(frozen=True)
class Measured:
    """What an evaluation found: sums over all micro-batches, the labels, and each sample's prediction, in order."""

    sums: list[float]
    labels: int
    predictions: list[Any] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    placed: PlacedModel,
    measure: Function,
    samples: Samples,
    *,
    micro_batch_size: int,
    among: Evaluators,
    policy: Policy,
    device: torch.device,
    predict: Predict | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Measured | None:
    """Sum what `measure(model, inputs)` gives [k] over all `samples`, in float64; gather what `predict` gives.

    Each evaluator takes every size-th micro-batch; the sums of the micro-batches are added up in their order, so the
    result does not depend on who computed them. What no rank has reported, because one has died, each computes again
    for itself. None if `stop()` came true on any rank: all leave together, at most ASK_EVERY micro-batches later.
    """
    rows = -(-len(samples) // micro_batch_size)
    rows += -rows % among.in_step  # the last ones without samples: as many for each of those in step
    ids = np.full((rows, micro_batch_size), ABSENT, dtype=np.int64)
    ids.flat[: len(samples)] = np.arange(len(samples))
    was_training = placed.model.training
    placed.before_forward()
    placed.model.eval()
    try:
        compute = partial(_compute, placed, measure, predict, samples, policy, device)
        found = _share_out(ids, among, compute, stop)
        if found is None:
            return None
        sums, texts = _combined(ids, found, among, compute)
    finally:
        placed.model.train(was_training)
        placed.after_evaluation()
    predictions = [json.loads(text) for text in texts[: len(samples)]] if any(texts) else []
    return Measured(sums, int(samples.label_counts(ids).sum()), predictions)


def _compute(
    placed: PlacedModel,
    measure: Function,
    predict: Predict | None,
    samples: Samples,
    policy: Policy,
    device: torch.device,
    ids: np.ndarray,
) -> Found:
    inputs = {name: tensor.to(device) for name, tensor in samples.collate(ids).items()}
    with policy.autocast(device):
        sums = placed.call(measure, inputs)
        rows = placed.call(predict, inputs) if predict else None
    texts = [json.dumps(row, sort_keys=True) for row in rows] if rows is not None else []
    return (None if sums is None else sums.double().cpu().view(-1)), texts


def _share_out(
    ids: np.ndarray, among: Evaluators, compute: Callable[[np.ndarray], Found], stop: Callable[[], bool]
) -> dict[int, Found] | None:
    """The results of this rank's micro-batches by their number; None if all ranks stop."""

    def stopping() -> bool:
        return bool(among.agree(torch.tensor([float(stop())], dtype=torch.float64)) > 0)

    found: dict[int, Found] = {}
    for turn, first in enumerate(range(0, len(ids), among.size)):  # as many on every rank, whatever its share
        if turn % ASK_EVERY == 0 and stopping():
            return None
        if (v := first + among.index) < len(ids):
            found[v] = compute(ids[v])
    return None if stopping() else found


def _combined(
    ids: np.ndarray, found: dict[int, Found], among: Evaluators, compute: Callable[[np.ndarray], Found]
) -> tuple[list[float], list[str]]:
    """The sums over all micro-batches, in their order, and the text of each row's prediction."""
    count, size = ids.shape
    widths = [len(sums) for sums, _ in found.values() if sums is not None]
    # How many sums there are: a rank that reports nothing does not know. Who knows, and what they know.
    known = among.agree(torch.tensor([bool(widths), max(widths, default=0)], dtype=torch.float64))
    width = int(known[1] / known[0])
    table = torch.zeros(
        count, width + 1 + size, dtype=torch.float64
    )  # sums; whether known; length of each text
    for v, (sums, texts) in found.items():
        if sums is not None:
            table[v, :width] = sums
        table[v, width] = 1
        table[v, width + 1 : width + 1 + len(texts)] = torch.tensor([len(t.encode()) for t in texts] or [])
    table = among.agree(table.view(-1)).view(count, -1)
    lengths = table[:, width + 1 :].long().view(-1)
    texts = _gathered({v: own for v, (_, own) in found.items()}, lengths, size, among)
    for v in (table[:, width] == 0).nonzero().flatten().tolist():
        again, own = compute(ids[v])
        assert again is not None, "only whole replicas lose a rank"
        table[v, :width] = again
        texts[v * size : v * size + len(own)] = own
    return [column.contiguous().sum().item() for column in table[:, :width].t()], texts


def _gathered(own: dict[int, list[str]], lengths: Tensor, size: int, among: Evaluators) -> list[str]:
    """The text of every row, gathered from the ranks: each has its `own`, by micro-batch."""
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return [""] * len(lengths)
    whole = torch.zeros(total, dtype=torch.uint8)
    for v, texts in own.items():
        for row, text in enumerate(texts, start=v * size):
            whole[ends[row] - lengths[row] : ends[row]] = torch.frombuffer(
                bytearray(text.encode()), dtype=torch.uint8
            )
    parts = [among.agree(part.double()).to(torch.uint8) for part in whole.split(TEXT_CHUNK)]
    data = bytes(torch.cat(parts).tolist())
    return [
        data[end - length : end].decode() for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def everyone(mesh: Mesh) -> Evaluators:
    """All ranks as evaluators, where every replica holds the same model."""
    island = Island(mesh)
    agree = partial(island.agree, mesh.wire("replicate").sum)
    return Evaluators(mesh.team, mesh.teams, agree, in_step=len(island.teams))


def measure(
    built: BuiltModel,
    samples: Samples,
    among: Evaluators,
    stop: Callable[[], bool] = lambda: False,
    predict: Predict | None = None,
) -> Measured | None:
    """Measure `samples` by the model's task, and predict them by the task or by `predict`; None if stopped."""
    return evaluate(
        built.placed,
        built.task.measure,
        samples,
        micro_batch_size=built.batches.shape[1],
        among=among,
        policy=built.policy,
        device=built.mesh.device,
        predict=predict or (built.task.predict if predicts(built.task) else None),
        stop=stop,
    )


def evaluate_model(built: BuiltModel, among: Evaluators, stop: Callable[[], bool]) -> dict[str, float] | None:
    """The task's metrics of a model over the whole "eval" split, {} if it is empty; None if `stop()` came true."""
    samples = built.task.samples("eval")
    if not len(samples):
        return {}
    measured = measure(built, samples, among, stop)
    if measured is None:
        return None
    return built.task.metrics(measured.sums, measured.labels, measured.predictions)


def validate(run: Run, stop: Callable[[], bool]) -> dict[str, float] | None:
    """The metrics of the one model of all replicas, as `evaluate_model` gives them.

    A rank that evaluates alone, stopped before the last step, gives {}: it takes steps until the strategy says
    after which one all stop.
    """
    members = run.sync.members
    alone = members.evaluates_alone
    if alone and run.mesh.replicate.index:
        return {}
    run.saver.wait_until_read()  # the shared model may overwrite what is being copied
    island = run.replica.island
    among = Evaluators(
        run.mesh.team,
        len(island.teams) if alone else run.mesh.teams,
        island.sum if alone else run.sum,
        in_step=len(island.teams),
    )
    with run.sync.shared_model(run.replica):
        run.saver.keep_model(run.progress.step)
        metrics = evaluate_model(
            run.built, among, stop=(lambda: stop() or members.hears_wish) if alone else stop
        )
    run.lap()  # the next step does not pay for this
    if metrics is None and alone and run.progress.step < run.total_steps:
        return {}
    return metrics
