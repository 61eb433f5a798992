"""Law 5: every tensor is reduced exactly once. Law 9: predicted bytes equal those measured."""

import socket
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from laws.plain import at_once
from laws.pool import Pool
from laws.rows import KINDS, VOCABULARY, RowsTask
from laws.strategies import STRATEGIES, each_that_keeps
from laws.worlds import Arrays, first_difference, gradient, run_of

from shoal.cost import Sizes
from shoal.sync import COSTS
from shoal.tensors.buckets import Bucket
from shoal.wire.mesh import Mesh

SEED, ROWS = 7, 12
HEAD_BYTES = 8 * (12 * VOCABULARY + VOCABULARY)  # of the head in float64: the first two tensors to arrive
BUCKETS = {"one tensor each": 1e-6, "fits": HEAD_BYTES / 1e6, "a byte less": (HEAD_BYTES - 1) / 1e6,
           "a byte more": (HEAD_BYTES + 1) / 1e6, "all in one": 25.0}  # fmt: skip
SETTINGS = {
    "precision": "64-true", "seed": SEED, "global_batch_size": ROWS, "per_device_train_batch_size": 2,
    "max_grad_norm": 0.0,
}  # fmt: skip


@dataclass
class Reduced:
    """One step: its gradients, and how often each parameter's bucket was announced, in which order."""

    grads: Arrays
    times: Counter[str]
    order: list[int]
    in_buckets: list[str]


def reduce(mesh: Mesh, strategy: str, task: RowsTask, bucket_mb: float, steps: int) -> list[Reduced]:
    run = run_of(mesh, strategy, task, bucket_mb=bucket_mb, **SETTINGS)
    buckets = run.replica.buckets
    names = {id(p): name for name, p in run.replica.params}
    attached = buckets.on_complete
    found = []
    for step in range(steps):
        times: Counter[str] = Counter()
        order: list[int] = []

        def count(bucket: Bucket, times: Counter[str] = times, order: list[int] = order) -> None:
            times.update(names[id(p)] for p in bucket.params)
            order.append(buckets.all.index(bucket))
            attached(bucket)

        buckets.on_complete = count
        grads, _ = gradient(run, step)
        found.append(Reduced(grads, times, order, [names[id(p)] for b in buckets for p in b.params]))
        for p in (p for _, p in run.replica.params):
            p.data.add_(0.01)  # the next step's gradients are others
    return found


@pytest.mark.parametrize("kind", KINDS)
@each_that_keeps(5)
def test_every_tensor_is_reduced_exactly_once(pool: Pool, strategy: str, kind: str) -> None:
    task = RowsTask(kind)
    whole, _ = pool.alone(at_once, task, SEED, ROWS).value
    for ranks in (1, 3):
        for case, bucket_mb in BUCKETS.items():
            for on_rank in pool.world(ranks, reduce, strategy, task, bucket_mb, 2):
                for step in on_rank:
                    assert Counter(step.in_buckets) == Counter(whole.keys()), case
                    assert step.times == Counter(whole.keys()), case
                    assert step.order == sorted(step.order)
                if kind != "sometimes":  # whole is one micro-batch, in which others are used
                    assert first_difference([whole], [on_rank[0].grads], 1e-12) is None, case
                assert first_difference([on_rank[0].grads], [on_rank[1].grads]) is not None


def test_bucket_sizes_split_fit_and_overflow(pool: Pool) -> None:
    """The sizes above are what their names say."""
    (counts,) = pool.world(1, tensors_of_buckets)
    assert counts == {
        "one tensor each": [1] * 9, "fits": [2, 4, 3], "a byte less": [2, 4, 3], "a byte more": [3, 3, 3],
        "all in one": [9],
    }  # fmt: skip


def tensors_of_buckets(mesh: Mesh) -> dict[str, list[int]]:
    found = {}
    for case, bucket_mb in BUCKETS.items():
        buckets = run_of(mesh, "allreduce", RowsTask(), bucket_mb=bucket_mb, **SETTINGS).replica.buckets
        found[case] = [len(bucket.params) for bucket in buckets]
    return found


BYTES_SENT = 200  # where struct tcp_info of Linux holds tcpi_bytes_sent, and behind it tcpi_bytes_retrans


def sent_by_this_process() -> int:
    """Payload bytes that every TCP connection of this process has sent, as the kernel counted them.

    Those that it sent again, because a busy machine was slow to answer, count once.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            is_socket = entry.readlink().name.startswith("socket:")
            opened = socket.socket(fileno=int(entry.name)) if is_socket else None
        except OSError:
            continue
        if opened is None:
            continue
        if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
            facts = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 16)
            sent, again = struct.unpack_from("<QQ", facts, BYTES_SENT)
            total += sent - again
        opened.detach()
    return total


@dataclass
class Sent:
    """What a rank sends in a period: by the strategy's prediction, by the wire's count, and by the kernel's."""

    predicted: float
    counted: int
    measured: int
    buckets: int


def bytes_of_a_period(mesh: Mesh, strategy: str, **settings: Any) -> Sent:
    run = run_of(mesh, strategy, RowsTask(), **SETTINGS | settings)
    padded = tuple(bucket.flat.shape for bucket in run.replica.buckets)
    run.mesh.wire("replicate").barrier()
    run.mesh.wire("replicate").bytes_sent, before = 0, sent_by_this_process()
    period = STRATEGIES[strategy].period
    for step in range(period):
        taken = run.replica.gradients(run.batches.at(step))
        run.sync.step(run.replica, taken)
    run.sync.state_dict()  # what still travels has to arrive first
    counted, measured = run.mesh.wire("replicate").bytes_sent, sent_by_this_process() - before
    run.mesh.wire("replicate").barrier()
    cost = COSTS[run.config.strategy.name](run.config, Sizes(padded, mesh.world_size, itemsize=8))
    predicted = period * cost.sent
    return Sent(predicted, counted, measured, len(run.replica.buckets.all))


HEADERS = 600  # of the transport, for a bucket and a peer


@pytest.mark.parametrize("bucket_mb", [0.002, 25.0])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@each_that_keeps(9)
def test_predicted_bytes_are_sent(pool: Pool, strategy: str, ranks: int, bucket_mb: float) -> None:
    rows = 2 * (6 if ranks == 3 else ranks)  # every share one subtree: what the prediction is for
    for found in pool.world(ranks, bytes_of_a_period, strategy, bucket_mb=bucket_mb, global_batch_size=rows):
        assert found.counted == pytest.approx(found.predicted, abs=0.5)
        headers = HEADERS * found.buckets * (ranks - 1)
        assert found.counted <= found.measured <= found.counted + headers * STRATEGIES[strategy].period
    assert ranks == 1 or found.predicted > 0
