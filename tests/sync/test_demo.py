"""DeMo: its rule as published, in one process in float64; its transform; and what all replicas must share."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from laws.plain import IGNORED
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import STRATEGIES, Strategy, asks
from laws.worlds import Arrays, first_difference, parameters, run_of
from torch.nn import functional as F

from shoal.cost import Sizes
from shoal.data.batches import Batches
from shoal.sync import COSTS
from shoal.sync.demo import DeMo, Waves, _cut
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

STEPS, EACH, ROWS, RATE, DECAY, SEED = 20, 2, 12, 0.02, 0.1, 3
SETTINGS: dict[str, Any] = {
    "strategy": "demo", "balance": "off", "max_steps": STEPS, "global_batch_size": ROWS, "seed": SEED,
    "per_device_train_batch_size": EACH, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_grad_norm": 0.0, "weight_decay": DECAY, "precision": "64-true", "bucket_mb": 0.002,
}  # fmt: skip
SMALL = {"demo_chunk": 8, "demo_topk": 3, "demo_decay": 0.9}
TASK = RowsTask("tied")  # every element gets a gradient: none of the signs hangs on a rounding error


# The transform


@pytest.mark.parametrize("size", [*range(1, 70), 97, 127, 131, 160, 768, 4096, 50257])
def test_a_dim_is_cut_into_parts_no_longer_than_the_chunk(size: int) -> None:
    parts, length = _cut(size, 64)
    assert (parts - 1) * length < size <= parts * length
    assert length <= 64
    assert parts * length - size < parts  # no more zeros than parts
    assert size <= 64 or length >= 32


@pytest.mark.parametrize(("size", "length"), [(64, 64), (768, 64), (96, 48), (160, 40), (1000, 50)])
def test_where_a_good_divisor_exists_the_parts_are_as_published(size: int, length: int) -> None:
    assert _cut(size, 64) == (size // length, length)


SHAPES = [(5,), (1,), (), (131,), (64, 64), (67, 130), (1, 9), (6, 3, 5), (128, 160)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_is_exact_and_the_transform_keeps_lengths(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float64)
    waves = Waves(shape, 64, 32)
    coefficients = waves.transform(tensor)
    assert torch.allclose(waves.inverse(coefficients), tensor, rtol=0, atol=1e-13)
    assert math.isclose(coefficients.norm().item(), tensor.norm().item(), rel_tol=1e-12)


def test_the_transform_is_the_cosine_sum_over_each_chunk() -> None:
    tensor = np.random.default_rng(0).normal(size=(10, 7))
    found = Waves(tensor.shape, 5, 1).transform(torch.tensor(tensor))
    assert found.shape == (4, 20)  # 7 is prime: two parts of 4, one column of zeros
    padded = np.pad(tensor, ((0, 0), (0, 1)))
    chunks = [padded[r : r + 5, c : c + 4] for r in (0, 5) for c in (0, 4)]
    for chunk, coefficients in zip(chunks, found.numpy(), strict=True):
        np.testing.assert_allclose(coefficients, dct2(chunk).ravel(), atol=1e-13)


def test_the_strongest_are_sent_as_many_of_each_chunk() -> None:
    waves = Waves((24, 12), 8, 3)
    values, indices = waves.strongest(torch.randn(24, 12))
    assert values.shape == indices.shape == (3 * 2, 3)
    assert waves.sent == values.numel()


# The rule


def dct2(x: np.ndarray) -> np.ndarray:
    """The orthonormal two-dimensional DCT-II, summed as it is written."""
    return _cosines(len(x)) @ x @ _cosines(x.shape[1]).T


def inverse2(c: np.ndarray) -> np.ndarray:
    return _cosines(len(c)).T @ c @ _cosines(c.shape[1])


def _cosines(n: int) -> np.ndarray:
    rows = [[math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)] for k in range(n)]
    scaled = np.array(rows) * math.sqrt(2 / n)
    scaled[0] = math.sqrt(1 / n)
    return np.where(np.abs(scaled) < 1e-12, 0, scaled)


def in_chunks(x: np.ndarray, chunk: int) -> list[tuple[slice, slice, int, int]]:
    """Where each chunk of a matrix lies, and how large it is with its zeros."""
    (down, high), (across, wide) = _cut(x.shape[0], chunk), _cut(x.shape[1], chunk)
    return [
        (slice(r * high, (r + 1) * high), slice(c * wide, (c + 1) * wide), high, wide)
        for r in range(down)
        for c in range(across)
    ]


def shared(momenta: list[np.ndarray], chunk: int, topk: int) -> tuple[list[np.ndarray], np.ndarray]:
    """What each replica takes out of its momentum of one parameter, and what all make of it together."""
    matrices = [m.reshape(m.shape[0], -1) if m.ndim > 1 else m.reshape(1, -1) for m in momenta]
    own, together = [np.zeros_like(m) for m in matrices], np.zeros_like(matrices[0])
    for rows, columns, high, wide in in_chunks(matrices[0], chunk):
        picked = []
        for m in matrices:
            block = np.zeros((high, wide))
            inside = m[rows, columns]
            block[: inside.shape[0], : inside.shape[1]] = inside
            coefficients = dct2(block).ravel()
            strongest = sorted(range(high * wide), key=lambda i, c=coefficients: -abs(c[i]))[:topk]
            picked.append({i: coefficients[i] for i in strongest if coefficients[i]})
        inside = matrices[0][rows, columns].shape
        for o, mine in zip(own, picked, strict=True):
            o[rows, columns] = _block(mine, high, wide)[: inside[0], : inside[1]]
        means = {}
        for i in {i for p in picked for i in p}:
            values = [p[i] for p in picked if i in p]
            means[i] = sum(values) / len(values)
        together[rows, columns] = _block(means, high, wide)[: inside[0], : inside[1]]
    shape = momenta[0].shape
    return [o.reshape(shape) for o in own], together.reshape(shape)


def _block(coefficients: dict[int, float], high: int, wide: int) -> np.ndarray:
    flat = np.zeros(high * wide)
    for i, value in coefficients.items():
        flat[i] = value
    return inverse2(flat.reshape(high, wide))


def simulate(
    ranks: int, chunk: int, topk: int, decay: float, max_norm: float
) -> tuple[list[Arrays], list[Arrays]]:
    """Parameters after each step, and the momentum of each replica after the last."""
    samples = TASK.samples("train")
    order = Batches(samples, seed=SEED, global_batch_size=ROWS, micro_batch_size=EACH)
    model = TASK.model().double()
    params = dict(model.named_parameters())
    momenta = [{n: np.zeros(p.shape) for n, p in params.items()} for _ in range(ranks)]
    history = []
    for step in range(STEPS):
        batches = [samples.collate(ids) for ids in order.at(step).ids]
        labels = sum(int((b["labels"] != IGNORED).sum()) for b in batches)
        ends = np.cumsum([len(batches) // ranks + (r < len(batches) % ranks) for r in range(ranks)])
        for r in range(ranks):
            model.zero_grad()
            for b in batches[ends[r - 1] if r else 0 : ends[r]]:
                scores = model(b["tokens"]).flatten(0, 1)
                loss = F.cross_entropy(scores, b["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
                (loss * ranks / labels).backward()
            if max_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for n, p in params.items():
                momenta[r][n] = decay * momenta[r][n] + RATE * p.grad.numpy()
        for n, p in params.items():
            own, together = shared([m[n] for m in momenta], chunk, topk)
            for m, taken in zip(momenta, own, strict=True):
                m[n] = m[n] - taken
            kept = 1 - RATE * DECAY if p.dim() >= 2 else 1.0
            p.data = torch.tensor(kept * p.detach().numpy() - RATE * np.sign(together))
        history.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return history, momenta


def run_with(mesh: Mesh, **settings: Any) -> Run:
    """A run as the table of the laws would have it under these settings."""
    STRATEGIES["these"] = Strategy(SETTINGS | settings, set())
    return run_of(mesh, "these", TASK)


def trained(mesh: Mesh, steps: int, **settings: Any) -> tuple[list[Arrays], Arrays]:
    run = run_with(mesh, **settings)
    history = []
    for step in range(steps):
        take(run, step)
        history.append(parameters(run))
    return history, {n.removeprefix("momentum/"): t.numpy().copy() for n, t in run.sync.state_dict().items()}


def take(run: Run, step: int) -> None:
    taken = run.replica.gradients(run.batches.at(step))
    run.sync.step(run.replica, taken)


@asks(6, "demo")
@pytest.mark.parametrize(("ranks", "max_norm"), [(1, 0.0), (2, 0.0), (3, 0.5), (4, 0.0)])
def test_it_is_the_published_rule(pool: Pool, ranks: int, max_norm: float) -> None:
    history, momenta = simulate(ranks, 8, 3, 0.9, max_norm)
    for (found, momentum), expected in zip(
        pool.world(ranks, trained, STEPS, max_grad_norm=max_norm, **SMALL), momenta, strict=True
    ):
        assert first_difference(history, found, 1e-10) is None
        assert first_difference([expected], [momentum], 1e-10) is None
        assert any(abs(m).max() > 1e-3 for m in momentum.values())  # something waits


def test_alone_and_with_all_coefficients_it_is_descent_by_signs(pool: Pool) -> None:
    ((found, momentum),) = pool.world(1, trained, STEPS, demo_chunk=8, demo_topk=64)
    history, _ = simulate_signs()
    assert first_difference(history, found, 1e-10) is None
    assert max(abs(m).max() for m in momentum.values()) < 1e-15


def simulate_signs() -> tuple[list[Arrays], None]:
    samples = TASK.samples("train")
    order = Batches(samples, seed=SEED, global_batch_size=ROWS, micro_batch_size=ROWS)
    model = TASK.model().double()
    history = []
    for step in range(STEPS):
        (batch,) = (samples.collate(ids) for ids in order.at(step).ids)
        model.zero_grad()
        scores = model(batch["tokens"]).flatten(0, 1)
        F.cross_entropy(scores, batch["labels"].flatten(), ignore_index=IGNORED).backward()
        for p in model.parameters():
            kept = 1 - RATE * DECAY if p.dim() >= 2 else 1.0
            p.data = kept * p.data - RATE * p.grad.sign()
        history.append({n: p.detach().numpy().copy() for n, p in model.named_parameters()})
    return history, None


# What all replicas share


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_replicas_stay_equal_to_the_last_bit(pool: Pool, ranks: int) -> None:
    first, *others = pool.world(ranks, trained, 8, precision="32-true")
    for other in others:
        assert first_difference(first[0], other[0]) is None
        assert first_difference([first[1]], [other[1]]) is not None  # but each keeps its own momentum


def with_a_bad_gradient(mesh: Mesh) -> tuple[list[Arrays], list[int], int]:
    run = run_with(mesh, **SMALL)
    assert isinstance(run.sync, DeMo)
    seen, failed = [], []
    for step in range(3):
        taken = run.replica.gradients(run.batches.at(step))
        if step == 1 and mesh.rank == 1:
            run.replica.buckets.all[-1].flat[0] = math.inf
        run.sync.step(run.replica, taken)
        momentum = {n: t.numpy().copy() for n, t in run.sync.state_dict().items()}
        seen.append(parameters(run) | momentum)
        failed.append(run.replica.nonfinite_steps)
    return seen, failed, len(run.replica.optimizer_state.optimizers[0].state)


def test_where_one_gradient_is_not_finite_nothing_changes_anywhere(pool: Pool) -> None:
    for seen, failed, held in pool.world(3, with_a_bad_gradient):
        assert failed == [0, 1, 0]
        assert first_difference(seen[:1], seen[1:2]) is None
        assert first_difference(seen[1:2], seen[2:]) is not None
        assert held == 0  # no other optimizer remembers anything


def bytes_of_a_step(mesh: Mesh, **settings: Any) -> tuple[float, int, int]:
    run = run_with(mesh, **settings)
    run.mesh.wire("replicate").bytes_sent = 0
    take(run, 0)
    sizes = Sizes(tuple(p.shape for _, p in run.replica.params), mesh.world_size, itemsize=8)
    return (
        COSTS[run.config.strategy.name](run.config, sizes).sent,
        run.mesh.wire("replicate").bytes_sent,
        sizes.nbytes,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predicted_bytes_are_sent(pool: Pool, ranks: int) -> None:
    for predicted, counted, dense in pool.world(ranks, bytes_of_a_step, demo_chunk=8, demo_topk=2):
        assert counted == predicted
        assert ranks == 1 or 0 < counted < 0.2 * dense * (ranks - 1)


def taken_over(mesh: Mesh, states: list[dict[str, torch.Tensor]]) -> Arrays:
    run = run_with(mesh, **SMALL)
    run.sync.load_state_dict(states)
    return {n: t.numpy().copy() for n, t in run.sync.state_dict().items()}


def test_what_waits_is_kept_when_the_number_of_ranks_changes(pool: Pool) -> None:
    saved = [momentum for _, momentum in pool.world(3, trained, 3, **SMALL)]
    states = [{f"momentum/{n}": torch.tensor(m) for n, m in each.items()} for each in saved]
    for rank, found in enumerate(pool.world(3, taken_over, states)):
        assert first_difference([{n: t.numpy() for n, t in states[rank].items()}], [found]) is None
    found = pool.world(2, taken_over, states)
    for name in states[0]:
        mean = sum(state[name].numpy() for state in states) / 3
        for each in found:
            np.testing.assert_allclose(each[name], mean, atol=1e-15)
