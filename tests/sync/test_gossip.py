"""Gossip: its rules as published, in one process in float64; what mixing conserves; and neighbours that die."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from laws.plain import IGNORED
from laws.pool import Pool
from laws.rows import RowsTask
from laws.strategies import STRATEGIES, Strategy, asks
from laws.worlds import Arrays, first_difference, parameters, run_of
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.cost import Sizes
from shoal.data.batches import Batches
from shoal.replica import Step
from shoal.sync import COSTS
from shoal.sync.gossip import TOPOLOGIES, Gossip, mixing_matrix
from shoal.training.run import Run
from shoal.wire.mesh import Mesh

STEPS, EACH, ROWS, RATE, SEED = 20, 2, 8, 0.05, 3
SETTINGS: dict[str, Any] = {
    "strategy": "gossip", "balance": "off", "max_steps": STEPS, "global_batch_size": ROWS, "seed": SEED,
    "per_device_train_batch_size": EACH, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_grad_norm": 0.0, "precision": "64-true", "bucket_mb": 0.002,
}  # fmt: skip
TASK = RowsTask("tied")
STILL = {"learning_rate": 0.0, "overlap_steps": 0}  # replicas only mix, and need no gradients for it
UNBALANCED = [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]]  # 0 -> 1, 2; 1 -> 2; 2 -> 0

Build = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), RATE),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1),
}


# The graphs


@pytest.mark.parametrize("world_size", range(1, 10))
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_and_columns_of_the_mixing_matrices_add_up_to_one(topology: str, world_size: int) -> None:
    for step in range(8):
        matrix = mixing_matrix(topology, world_size, step)
        ones = torch.ones(world_size, dtype=torch.float64)
        torch.testing.assert_close(matrix.sum(0), ones)
        torch.testing.assert_close(matrix.sum(1), ones)
        assert (matrix >= 0).all()
        assert (matrix.diagonal() > 0).all()


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_one_turn_of_the_exponential_graph_averages_exactly(world_size: int) -> None:
    steps = range(world_size.bit_length() - 1)
    turn = torch.linalg.multi_dot([torch.eye(world_size).double()] * 2 + [
        mixing_matrix("exponential", world_size, step) for step in steps
    ])  # fmt: skip
    torch.testing.assert_close(turn, torch.full_like(turn, 1 / world_size))


def shift(world_size: int, ahead: int) -> Tensor:
    """The permutation that hands each rank what the rank `ahead` places before it holds."""
    return torch.roll(torch.eye(world_size, dtype=torch.float64), ahead, dims=0)


def published(topology: str, world_size: int, step: int) -> Tensor:
    eye = torch.eye(world_size, dtype=torch.float64)
    if topology == "ring":
        if world_size == 2:
            return (eye + shift(2, 1)) / 2
        return (eye + shift(world_size, 1) + shift(world_size, -1)) / 3
    return (eye + shift(world_size, 2 ** (step % {2: 1, 3: 2, 4: 2}[world_size]))) / 2


# The rules, for all replicas in one process


class Replicas:
    """N replicas of a model in float64: their gradients, and what mixing and the optimizers make of their rows X."""

    def __init__(self, ranks: int, build: Build) -> None:
        self.samples = TASK.samples("train")
        self.order = Batches(self.samples, seed=SEED, global_batch_size=ROWS, micro_batch_size=EACH)
        self.models = [TASK.model().double() for _ in range(ranks)]
        self.optimizers = [build(model) for model in self.models]
        self.weights = torch.ones(ranks, dtype=torch.float64)

    @property
    def rows(self) -> Tensor:
        vectors = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in self.models]
        return torch.stack(vectors)

    def put(self, rows: Tensor) -> None:
        for model, row in zip(self.models, rows, strict=True):
            nn.utils.vector_to_parameters(row.clone(), model.parameters())

    def gradients(self, step: int) -> None:
        """Of each replica over its own micro-batches, N times; the first ranks take one more if it does not fit."""
        micro_batches = [self.samples.collate(ids) for ids in self.order.at(step).ids]
        labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        ranks = len(self.models)
        each, more = divmod(len(micro_batches), ranks)
        rest = iter(micro_batches)
        for rank, model in enumerate(self.models):
            model.zero_grad()
            for batch in [next(rest) for _ in range(each + (rank < more))]:
                scores = model(batch["tokens"]).flatten(0, 1)
                loss = F.cross_entropy(
                    scores, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
                )
                (loss * ranks / labels).backward()

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def arrays(self) -> list[Arrays]:
        return [{n: p.detach().numpy().copy() for n, p in model.named_parameters()} for model in self.models]


def communicate_then_adapt(all_: Replicas, matrix: Tensor) -> None:
    """D-PSGD: the gradient is that of the replica before it is averaged."""
    all_.put(matrix @ all_.rows)
    all_.optimize()


def adapt_then_communicate(all_: Replicas, matrix: Tensor) -> None:
    all_.optimize()
    all_.put(matrix @ all_.rows)


def push_sum(all_: Replicas, matrix: Tensor) -> None:
    """SGP with overlap: z = x / w is held, x and w are mixed, the optimizer steps x."""
    numerators = matrix @ (all_.weights[:, None] * all_.rows)
    all_.weights = matrix @ all_.weights
    all_.put(numerators)
    all_.optimize()
    all_.put(all_.rows / all_.weights[:, None])


def push_sum_afterwards(all_: Replicas, matrix: Tensor) -> None:
    """SGP as printed: the optimizer steps x, then x and w are mixed."""
    all_.put(all_.weights[:, None] * all_.rows)
    all_.optimize()
    all_.weights, numerators = matrix @ all_.weights, matrix @ all_.rows
    all_.put(numerators / all_.weights[:, None])


RULES = {
    ("ring", True): communicate_then_adapt, ("ring", False): adapt_then_communicate,
    ("exponential", True): communicate_then_adapt, ("exponential", False): adapt_then_communicate,
    ("push-sum", True): push_sum, ("push-sum", False): push_sum_afterwards,
}  # fmt: skip


def run_with(mesh: Mesh, **settings: Any) -> Run:
    """A run as the table of the laws would have it under these settings."""
    STRATEGIES["these"] = Strategy(SETTINGS | settings, set())
    return run_of(mesh, "these", TASK)


def started(
    mesh: Mesh, optimizer: str = "sgd", matrix: list[list[float]] | None = None, **settings: Any
) -> Run:
    """A run with one of the optimizers above, and another graph on request."""
    run = run_with(mesh, **settings)
    run.replica.optimizers = [OPTIMIZERS[optimizer](run.replica.model)]
    if matrix is not None:
        run.sync.matrix = lambda step: torch.tensor(matrix, dtype=torch.float64)  # type: ignore[attr-defined]
    return run


def trained(mesh: Mesh, cases: list[dict[str, Any]]) -> list[list[Arrays]]:
    """This rank's parameters after each step, for each of several settings."""
    found = []
    for case in cases:
        run = started(mesh, **case)
        found.append([])
        for step in range(STEPS):
            take(run, step)
            found[-1].append(parameters(run))
    return found


def take(run: Run, step: int) -> None:
    taken = run.replica.gradients(run.batches.at(step))
    run.sync.step(run.replica, taken)


EVERY = [(topology, optimizer) for topology in TOPOLOGIES for optimizer in OPTIMIZERS]
ONE_EACH = list(zip(TOPOLOGIES, OPTIMIZERS, strict=True))


@asks(6, "gossip", "gossip-push-sum")
@pytest.mark.parametrize(
    ("overlap", "chosen"), [(True, EVERY), (False, ONE_EACH)], ids=["overlapped", "afterwards"]
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_they_are_the_published_rules(
    pool: Pool, ranks: int, overlap: bool, chosen: list[tuple[str, str]]
) -> None:
    cases = [{"topology": t, "optimizer": o, "overlap_steps": int(overlap)} for t, o in chosen]
    found = pool.world(ranks, trained, cases)
    for number, case in enumerate(cases):
        all_, rule = Replicas(ranks, OPTIMIZERS[case["optimizer"]]), RULES[case["topology"], overlap]
        for step in range(STEPS):
            all_.gradients(step)
            rule(all_, published(case["topology"], ranks, step))
            for rank, expected in enumerate(all_.arrays()):
                difference = first_difference([expected], [found[rank][number][step]], 1e-10)
                assert difference is None, f"{case}, rank {rank}, {step}: {difference}"


@pytest.mark.parametrize("overlap", [True, False])
def test_push_sum_on_an_unbalanced_graph_is_the_published_rule(pool: Pool, overlap: bool) -> None:
    case = {"topology": "push-sum", "overlap_steps": int(overlap), "matrix": UNBALANCED}
    found = pool.world(3, trained, [{**case, "optimizer": name} for name in OPTIMIZERS])
    for number, build in enumerate(OPTIMIZERS.values()):
        all_ = Replicas(3, build)
        for step in range(STEPS):
            all_.gradients(step)
            RULES["push-sum", overlap](all_, torch.tensor(UNBALANCED, dtype=torch.float64))
            for rank, expected in enumerate(all_.arrays()):
                assert first_difference([expected], [found[rank][number][step]], 1e-10) is None


@pytest.mark.parametrize("topology", ["exponential", "push-sum"])
def test_on_the_complete_graph_mixing_afterwards_is_all_reduce(pool: Pool, topology: str) -> None:
    uniform = [[1 / 3] * 3] * 3
    gossip = {"topology": topology, "overlap_steps": 0, "matrix": uniform, "optimizer": "momentum"}
    for one, other in pool.world(3, trained, [gossip, {"strategy": "allreduce", "optimizer": "momentum"}]):
        assert first_difference(other, one, 1e-10) is None


def test_alone_it_is_plain_training_to_the_last_bit(pool: Pool) -> None:
    cases = [{"strategy": "allreduce"}, *({"topology": topology} for topology in TOPOLOGIES)]
    ((plain, *others),) = pool.world(1, trained, cases)
    for other in others:
        assert first_difference(plain, other) is None


def each(mesh: Mesh, function: Callable[..., Any], cases: list[dict[str, Any]]) -> list[Any]:
    """What `function` returns under each of several settings: one world of processes for all of them."""
    return [function(mesh, **case) for case in cases]


# What mixing conserves


def spread(run: Run) -> None:
    """Have the replicas hold different parameters."""
    torch.manual_seed(run.mesh.rank)
    with torch.no_grad():
        for _, p in run.replica.params:
            p.add_(torch.randn_like(p))


def vector(run: Run) -> np.ndarray:
    return np.concatenate([array.ravel() for array in parameters(run).values()])


def mixed(mesh: Mesh, steps: int, averages: bool = False, **settings: Any) -> tuple[np.ndarray, list[float]]:
    """Where a replica stands [steps + 1, P] while nothing is learnt, and its weight. `averages`: without push-sum."""
    run = started(mesh, **STILL | settings)
    assert isinstance(run.sync, Gossip)
    run.sync.push_sum = run.sync.push_sum and not averages
    spread(run)
    history, weights = [vector(run)], [1.0]
    for step in range(steps):
        run.sync.step(run.replica, Step(step, 1, 1, torch.zeros(1)))
        history.append(vector(run))
        weights.append(run.sync.weight.item())
    return np.array(history), weights


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mixing_conserves_the_mean_and_brings_the_replicas_together(pool: Pool, ranks: int) -> None:
    by_rank = pool.world(ranks, each, mixed, [{"topology": topology, "steps": 40} for topology in TOPOLOGIES])
    for topology, found in zip(TOPOLOGIES, zip(*by_rank, strict=True), strict=True):
        histories = np.array([history for history, _ in found])
        mean = histories.mean(0)
        np.testing.assert_allclose(mean, np.broadcast_to(mean[0], mean.shape), atol=1e-13, err_msg=topology)
        last = histories[:, -1]
        np.testing.assert_allclose(last, np.broadcast_to(mean[0], last.shape), atol=1e-9, err_msg=topology)
        assert abs(histories[:, 0] - mean[0]).max() > 1


def test_on_an_unbalanced_graph_push_sum_reaches_the_mean_and_a_plain_average_does_not(pool: Pool) -> None:
    settings = {"topology": "push-sum", "matrix": UNBALANCED}
    found = pool.world(3, mixed, 60, **settings)
    mean = np.mean([history[0] for history, _ in found], axis=0)
    for history, _ in found:
        np.testing.assert_allclose(history[-1], mean, atol=1e-12)
    weights = np.array([each for _, each in found])
    np.testing.assert_allclose(weights.sum(0), 3, atol=1e-12)
    assert abs(weights - 1).max() > 0.2
    for history, _ in pool.world(3, mixed, 60, averages=True, **settings):
        assert abs(history[-1] - mean).max() > 0.05


# The one model of all


def evaluated(mesh: Mesh, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    run = started(mesh, **settings)
    spread(run)
    for step in range(3):
        take(run, step)
    run.sync.weight.mul_(0.7 if run.sync.push_sum else 1)  # type: ignore[attr-defined]  # as if some were lost
    before = vector(run)
    with run.sync.shared_model(run.replica):
        within = vector(run)
    distance = run.sync.metrics()["sync/consensus_distance"]
    return before, within, vector(run), run.sync.weight.item(), distance  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [
    {"topology": "ring"}, {"topology": "exponential"}, {"topology": "push-sum", "matrix": UNBALANCED}
], ids=["ring", "exponential", "push-sum"])  # fmt: skip
def test_the_model_that_is_evaluated_is_the_weighted_mean(pool: Pool, settings: dict[str, Any]) -> None:
    found = pool.world(3, evaluated, **settings)
    weights = [weight for *_, weight, _ in found]
    mean = sum(w * before for w, (before, *_) in zip(weights, found, strict=True)) / sum(weights)
    for before, within, after, _, _ in found:
        np.testing.assert_allclose(within, mean, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(within, found[0][1])
        np.testing.assert_array_equal(after, before)
        assert abs(before - mean).max() > 1e-3


def test_the_metric_is_the_distance_to_the_neighbours_before_mixing(pool: Pool) -> None:
    def metric(histories: list[np.ndarray], rank: int) -> float:
        own = histories[rank]
        others = [x for r, x in enumerate(histories) if r != rank]
        return float(np.sqrt(np.mean([((x - own) ** 2).sum() for x in others]) / (own**2).sum()))

    found = pool.world(3, first_metric, topology="ring")
    for rank, (_, distance) in enumerate(found):
        assert distance == pytest.approx(metric([history for history, _ in found], rank))


def first_metric(mesh: Mesh, **settings: Any) -> tuple[np.ndarray, float]:
    run = started(mesh, **settings)
    spread(run)
    before = vector(run)
    take(run, 0)
    return before, run.sync.metrics()["sync/consensus_distance"]


# Bytes, and what a checkpoint holds


def bytes_of(mesh: Mesh, steps: int, unpadded: bool = False, **settings: Any) -> tuple[float, int]:
    run = started(mesh, **settings)
    run.mesh.wire("replicate").bytes_sent = 0
    for step in range(steps):
        take(run, step)
    shapes = tuple(bucket.flat.shape for bucket in run.replica.buckets)
    if unpadded:
        shapes = tuple(shape for bucket in run.replica.buckets for shape in bucket.shapes)
    return steps * COSTS[run.config.strategy.name](
        run.config, Sizes(shapes, mesh.world_size, itemsize=8)
    ).sent, run.mesh.wire("replicate").bytes_sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_predicted_bytes_are_sent(pool: Pool, ranks: int) -> None:
    cases = [{"topology": topology, "steps": 3} for topology in TOPOLOGIES]
    for found in pool.world(ranks, each, bytes_of, cases):
        for predicted, counted in found:
            assert counted == predicted
            assert ranks == 1 or counted > 0


def interrupted(mesh: Mesh, **settings: Any) -> tuple[Arrays, Arrays]:
    """The parameters after four steps, and after two and two with everything handed to a new run."""
    whole = started(mesh, **settings)
    for step in range(4):
        take(whole, step)
    first, second = started(mesh, **settings), started(mesh, **settings)
    for step in range(2):
        take(first, step)
    states = [
        {n: t.clone() for n, t in first.sync.state_dict().items()} if r == mesh.rank else {} for r in range(3)
    ]
    states[0] = {"rounds": torch.tensor([2]), **states[0]}
    second.sync.load_state_dict(states)
    second.replica.model.load_state_dict(first.replica.model.state_dict())
    for step in range(2, 4):
        take(second, step)
    return parameters(whole), parameters(second)


@pytest.mark.parametrize("settings", [
    {"topology": "exponential"}, {"topology": "push-sum", "matrix": UNBALANCED}
], ids=["exponential", "push-sum"])  # fmt: skip
def test_interrupted_it_goes_on_to_the_last_bit(pool: Pool, settings: dict[str, Any]) -> None:
    for whole, resumed in pool.world(3, interrupted, **settings):
        assert first_difference([whole], [resumed]) is None


# Under guard


def guarded(mesh: Mesh) -> tuple[list[Arrays], list[int]]:
    """Two synchronous steps, three of gossip, and two after the guard has seen a loss that is lost."""
    run = started(mesh, topology="ring", guard=0.5, guard_steps=2)
    history, sent = [parameters(run)], []
    for step in range(7):
        if step == 5:
            for _ in range(10):
                run.sync.watch(1.0)
            run.sync.watch(math.inf)
            history[-1] = parameters(run)
        before = run.mesh.wire("replicate").bytes_sent
        take(run, step)
        sent.append(run.mesh.wire("replicate").bytes_sent - before)
        history.append(parameters(run))
    return history, sent


def test_a_guard_begins_and_ends_it_cleanly(pool: Pool) -> None:
    found = pool.world(3, guarded)
    one = Replicas(1, OPTIMIZERS["sgd"])
    for step in range(7):
        apart = [
            first_difference(found[0][0][step + 1 : step + 2], other[step + 1 : step + 2])
            for other, _ in found
        ]
        if step in (2, 3):
            assert all(apart[1:])
            continue
        assert step == 4 or not any(apart)
        if step in (0, 1, 5, 6):  # from the same parameters, by the gradient of the whole batch
            one.put(torch.stack([torch.cat([torch.tensor(a).flatten() for a in found[0][0][step].values()])]))
            one.gradients(step)
            one.optimize()
            assert first_difference(one.arrays(), found[0][0][step + 1 : step + 2], 1e-10) is None, step
    assert all(sent[5] == sent[0] for _, sent in found)


# Neighbours that die

DEAD, AT = 2, 5


def bereft(mesh: Mesh, dead: int, **settings: Any) -> tuple[list[Arrays], list[float], np.ndarray, float]:
    """Train while one rank dies before step AT: this rank's parameters, what it hears, and the model of all."""
    run = started(mesh, **settings)
    history, heard = [], []
    for step in range(STEPS):
        if (mesh.rank, step) == (dead, AT):
            os._exit(0)
        take(run, step)
        history.append(parameters(run))
        heard.append(run.sync.members.agree(torch.tensor([10.0**mesh.rank])).item())
    with run.sync.shared_model(run.replica):
        return history, heard, vector(run), run.sync.weight.item()  # type: ignore[attr-defined]


def without(matrix: Tensor, dead: int, columns: bool) -> Tensor:
    """What is left of W: a survivor keeps what it would have heard (of its row) or sent (of its column)."""
    left = matrix.clone()
    left[dead], left[:, dead] = 0.0, 0.0
    for rank in range(len(left)):
        left[rank, rank] = 0.0
        left[rank, rank] = 1 - (left[:, rank] if columns else left[rank]).sum()
    return left


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_others_go_on_without_a_neighbour_that_dies(pool: Pool, topology: str) -> None:
    outcomes = pool.wait(pool.start(bereft, DEAD, ranks=4, topology=topology))
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes
    all_ = Replicas(4, OPTIMIZERS["sgd"])
    for step in range(STEPS):
        all_.gradients(step)
        matrix = published(topology, 4, step)
        gone = without(matrix, DEAD, columns=topology == "push-sum")
        RULES[topology, True](all_, matrix if step < AT else gone)
        for rank in {0, 1, 3}:
            found = outcomes[rank].value[0][step]
            assert first_difference([all_.arrays()[rank]], [found], 1e-10) is None, (
                f"rank {rank}, step {step}"
            )
    left = [0, 1, 3]
    mean = (all_.weights[left, None] * all_.rows[left]).sum(0) / all_.weights[left].sum()
    for rank in left:
        _, heard, model, weight = outcomes[rank].value
        assert heard == [1111.0] * AT + [1011.0] * (STEPS - AT)
        np.testing.assert_allclose(model, mean.numpy(), atol=1e-10)
        np.testing.assert_allclose(weight, all_.weights[rank])
    said = [line for outcome in outcomes for line in outcome.output.splitlines()]
    assert said == [f"shoal: worker {DEAD} no longer answers: 3 go on without it"]


def test_one_goes_on_alone_when_all_others_die(pool: Pool) -> None:
    outcomes = pool.wait(pool.start(lonely, ranks=3))
    assert outcomes[1].value == [111.0] * 3 + [11.0] + [10.0] * 2
    assert outcomes[0].output == "shoal: worker 2 no longer answers: 2 go on without it\n"
    assert outcomes[1].output == "shoal: worker 0 no longer answers: 1 go on without it\n"


def lonely(mesh: Mesh) -> list[float]:
    run = started(mesh, topology="ring")
    heard = []
    for step in range(6):
        if (mesh.rank, step) in ((2, 3), (0, 4)):
            os._exit(0)
        take(run, step)
        heard.append(run.sync.members.agree(torch.tensor([10.0**mesh.rank])).item())
    return heard


# Encoded


CODECS: dict[str, dict[str, Any]] = {
    "bf16": {}, "fp16": {}, "int8": {}, "int4": {"block": 64}, "sign": {}, "topk": {"density": 0.2},
    "randomk": {"density": 0.2}, "powersgd": {"rank": 2},
}  # fmt: skip


def largest(rows: Tensor, share: float) -> Tensor:
    """Of each row the elements of largest magnitude, zeros elsewhere."""
    count = round(share * rows.shape[1])
    return torch.stack([torch.where(row.abs() >= row.abs().sort().values[-count], row, 0) for row in rows])


ENCODED: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "bf16": ({}, lambda rows: rows.to(torch.bfloat16).double()),
    "topk": ({"density": 0.2}, lambda rows: largest(rows, 0.2)),
}


@asks(6, "gossip-int8")
@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_encoded_it_is_the_published_rule_of_differences(pool: Pool, topology: str, codec: str) -> None:
    options, encode = ENCODED[codec]
    part = {"bf16": 1.0, "topk": 0.6}[codec]
    case = {
        "topology": topology,
        "codec": codec,
        "mixing": 0.6,
        "optimizer": "adamw",
        "bucket_mb": 25.0,
        **options,
    }
    if codec == "bf16":
        del case["mixing"]
    found = pool.world(4, trained, [case])
    all_ = Replicas(4, OPTIMIZERS["adamw"])
    copies: dict[tuple[int, int], Tensor] = {}
    start = all_.rows[0]
    for step in range(STEPS):
        matrix, rows = published(topology, 4, step), all_.rows
        moved = rows.clone()
        for i, j in [(i, j) for i in range(4) for j in range(4) if i != j and matrix[i, j]]:
            known = copies.get((j, i), start)
            copies[j, i] = known + encode((rows[j] - known)[None])[0]
            moved[i] += part * matrix[i, j] * copies[j, i]
            moved[j] -= part * matrix[i, j] * copies[j, i]
        all_.gradients(step)
        all_.put(moved)
        all_.optimize()
        for rank, expected in enumerate(all_.arrays()):
            assert first_difference([expected], [found[rank][0][step]], 1e-10) is None, (
                f"rank {rank}, step {step}"
            )


@pytest.mark.parametrize("topology", ["ring", "exponential"])
def test_whatever_a_codec_leaves_out_the_mean_is_conserved(pool: Pool, topology: str) -> None:
    cases = [{"topology": topology, "steps": 60, "codec": codec, **CODECS[codec]} for codec in CODECS]
    for codec, found in zip(CODECS, zip(*pool.world(3, each, mixed, cases), strict=True), strict=True):
        histories = np.array([history for history, _ in found])
        mean = histories.mean(0)
        np.testing.assert_allclose(mean, np.broadcast_to(mean[0], mean.shape), atol=1e-11, err_msg=codec)
        apart = np.linalg.norm(histories - mean, axis=(0, 2))
        assert apart[-1] < 0.7 * apart[0], codec


def known(mesh: Mesh, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = started(mesh, **settings)
    spread(run)
    for step in range(5):
        take(run, step)
    state = {
        name: tensor.clone() for name, tensor in run.sync.state_dict().items() if name.startswith("copy/")
    }
    return tuple({n: t for n, t in state.items() if f"/{way}/" in n} for way in ("own", "other"))  # type: ignore[return-value]


@pytest.mark.parametrize("codec", ["int4", "powersgd"])
def test_both_ends_of_an_edge_hold_the_same_copy(pool: Pool, codec: str) -> None:
    found = pool.world(4, known, topology="exponential", codec=codec, **CODECS[codec])
    for rank, (own, _) in enumerate(found):
        for name, copy in own.items():
            _, _, receiver, bucket = name.split("/")
            assert torch.equal(copy, found[int(receiver)][1][f"copy/other/{rank}/{bucket}"])


def test_predicted_bytes_are_sent_encoded(pool: Pool) -> None:
    common = {"topology": "ring", "bucket_mb": 25.0, "unpadded": True, "steps": 2}
    cases = [{"codec": codec, **common, **CODECS[codec]} for codec in CODECS]
    for found in pool.world(3, each, bytes_of, cases):
        for codec, (predicted, counted) in zip(CODECS, found, strict=True):
            assert counted == predicted, codec


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_encoded_it_goes_on_to_the_last_bit(pool: Pool, codec: str) -> None:
    for whole, resumed in pool.world(3, interrupted, topology="exponential", codec=codec, **CODECS[codec]):
        assert first_difference([whole], [resumed]) is None
