"""The published update rules of the local strategies, for all replicas in one process, in float64.

Written from the papers' equations over whole vectors, with nothing of shoal's but the order of the data, the inner
optimizers (torch's) and the tasks of the tests.
"""

from collections.abc import Callable
from typing import Any

import torch
from laws.rows import IGNORED, RowsTask
from laws.worlds import Arrays, follow
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.data.batches import Batches
from shoal.optim import optimizers as optimizing
from shoal.sync.noloco import partner

EACH, RATE, SEED, STEPS = 2, 0.02, 3, 20
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "global_batch_size": 12, "per_device_train_batch_size": EACH, "learning_rate": RATE,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.1,
    "precision": "64-true", "bucket_mb": 1e-6, "balance": "off", "seed": SEED,
}  # fmt: skip
Vectors = list[Tensor]  # of each replica, all parameters in one


def followed(mesh: Any, task: RowsTask, **settings: Any) -> list[Arrays]:
    """Every parameter of this rank after each step of a run."""
    return follow(mesh, "allreduce", task, **settings).tensors


class World:
    """N replicas that take their inner steps alone; a rule says what happens to them after each."""

    def __init__(self, task: RowsTask, ranks: int, optimizer: str, rows: int) -> None:
        self.samples = task.samples("train")
        self.order = Batches(self.samples, seed=SEED, global_batch_size=rows, micro_batch_size=EACH)
        self.models = [task.model().double() for _ in range(ranks)]
        self.optimizers = [
            optimizing.build(optimizer, list(model.named_parameters()), optimizing.Hyperparameters(RATE, 0.1))
            for model in self.models
        ]
        self.labels = 0  # of the last step, of all replicas

    def inner_step(self, step: int, *, together: bool) -> None:
        """Each replica updates by the mean gradient a label of its own share; `together`: of the whole batch."""
        micro_batches = [self.samples.collate(ids) for ids in self.order.at(step).ids]
        each = len(micro_batches) // len(self.models)
        self.labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        for rank, (model, optimizers) in enumerate(zip(self.models, self.optimizers, strict=True)):
            share = micro_batches if together else micro_batches[rank * each : (rank + 1) * each]
            labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in share)
            model.zero_grad()
            for batch in share:
                scores = model(batch["tokens"]).flatten(0, 1)
                loss = F.cross_entropy(
                    scores, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
                )
                (loss / labels).backward()
            for optimizer in optimizers:
                optimizer.step()

    def vectors(self) -> Vectors:
        """Where each replica stands."""
        return [nn.utils.parameters_to_vector(model.parameters()).detach().clone() for model in self.models]

    def put(self, vectors: Vectors) -> None:
        """Have each replica stand there."""
        for model, vector in zip(self.models, vectors, strict=True):
            nn.utils.vector_to_parameters(vector.clone(), model.parameters())  # which become views of it

    def arrays(self) -> list[Arrays]:
        """Every parameter of each replica by name."""
        return [{n: p.detach().numpy().copy() for n, p in model.named_parameters()} for model in self.models]

    def masks(self, fragments: int) -> list[Tensor]:
        """Which elements of a vector each fragment holds, where every parameter is a bucket of its own."""
        sizes = [p.numel() for p in self.models[0].parameters()]
        found = []
        for f in range(fragments):
            of_fragment = [(len(sizes) - 1 - i) % fragments == f for i in range(len(sizes))]
            found.append(
                torch.cat([torch.full((n,), inside) for n, inside in zip(sizes, of_fragment, strict=True)])
            )
        return found


def mean(vectors: Vectors) -> Tensor:
    """Their mean."""
    return torch.stack(vectors).mean(0)


Rule = Callable[[World, int], None]  # called after each inner step with the number of those done


def averaging(every: int) -> Rule:
    def rule(world: World, done: int) -> None:
        if done and done % every == 0:
            world.put([mean(world.vectors())] * len(world.models))

    return rule


def by_tokens(tokens: int) -> Rule:
    seen = 0

    def rule(world: World, done: int) -> None:
        nonlocal seen
        seen += world.labels
        if seen >= tokens:
            seen = 0
            world.put([mean(world.vectors())] * len(world.models))

    return rule


def in_groups(every: int, size: int, every_globally: int) -> Rule:
    def rule(world: World, done: int) -> None:
        vectors = world.vectors()
        if done % every_globally == 0:
            world.put([mean(vectors)] * len(vectors))
        elif done % every == 0:
            firsts = [size * (rank // size) for rank in range(len(vectors))]
            world.put([mean(vectors[first : first + size]) for first in firsts])

    return rule


def with_outer(every: int, move: Callable[[Tensor, Tensor, dict[str, Any]], Tensor]) -> Rule:
    """`move(x, mean of y, memory)` is the new x."""
    memory: dict[str, Any] = {}

    def rule(world: World, done: int) -> None:
        if done % every == 0:
            memory["x"] = move(memory["x"], mean(world.vectors()), memory)
            world.put([memory["x"]] * len(world.models))

    return _from_the_start(rule, memory)


def slowmo(alpha: float, beta: float) -> Callable[[Tensor, Tensor, dict[str, Any]], Tensor]:
    def move(x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
        memory["u"] = beta * memory.get("u", 0) + (x - y) / RATE
        return x - alpha * RATE * memory["u"]

    return move


def block_momentum(eta: float, zeta: float) -> Callable[[Tensor, Tensor, dict[str, Any]], Tensor]:
    def move(x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
        memory["d"] = eta * memory.get("d", 0) + zeta * (y - x)
        return x + memory["d"]

    return move


def nesterov(rate: float, mu: float) -> Callable[[Tensor, Tensor, dict[str, Any]], Tensor]:
    def move(x: Tensor, y: Tensor, memory: dict[str, Any]) -> Tensor:
        memory["m"] = mu * memory.get("m", 0) + (x - y)
        return x - rate * ((x - y) + mu * memory["m"])

    return move


def sparse(every: int, density: float, chunk: int, decay: float, rate: float) -> Rule:
    """SparseLoCo, where each parameter is sent for itself."""
    memory: dict[str, Any] = {}

    def chosen(part: Tensor) -> Tensor:
        """The largest of each chunk, elsewhere 0."""
        kept = torch.zeros_like(part)
        for start in range(0, len(part), chunk):
            of_chunk = part[start : start + chunk]
            count = max(1, round(density * len(of_chunk)))
            places = start + of_chunk.abs().argsort(descending=True)[:count]
            kept[places] = part[places]
        return kept

    def two_bits(kept: Tensor) -> Tensor:
        """Of each that is not 0 its sign, and one of two magnitudes."""
        sizes = kept.abs()
        border = sizes[kept != 0].mean()
        for group in ((sizes > 0) & (sizes <= border), sizes > border):
            if group.any():
                kept = torch.where(group, kept.sign() * sizes[group].mean(), kept)
        return kept

    def rule(world: World, done: int) -> None:
        if done % every:
            return
        errors = memory.setdefault("e", [torch.zeros_like(memory["x"]) for _ in world.models])
        counts = [p.numel() for p in world.models[0].parameters()]
        sent = []
        for i, y in enumerate(world.vectors()):
            errors[i] = decay * errors[i] + (memory["x"] - y)
            sent.append(torch.cat([two_bits(chosen(part)) for part in errors[i].split(counts)]))
            errors[i] = errors[i] - sent[i]
        memory["x"] = memory["x"] - rate * mean(sent)
        world.put([memory["x"]] * len(world.models))

    return _from_the_start(rule, memory)


def in_pairs(every: int, beta: float, alpha: float, gamma: float) -> Rule:
    """NoLoCo. Who meets whom is shoal's choice, as the order of the data is."""
    slow: Vectors = []
    moves: Vectors = []

    def rule(world: World, done: int) -> None:
        count = len(world.models)
        if done == 0:
            slow[:], moves[:] = world.vectors(), [torch.zeros_like(x) for x in world.vectors()]
        if done == 0 or done % every:
            return
        away = [x - y for x, y in zip(slow, world.vectors(), strict=True)]
        met = [partner(rank, count, SEED, done // every - 1) for rank in range(count)]
        assert sorted(met) == list(range(count))
        assert all(met[met[rank]] == rank for rank in range(count))
        new = []
        for rank, other in enumerate(met):
            pull = slow[rank] - (slow[rank] + slow[other]) / 2
            moves[rank] = alpha * moves[rank] + beta * (away[rank] + away[other]) / 2 + gamma * pull
            new.append(slow[rank] - moves[rank])
        slow[:] = new
        world.put(new)

    return rule


def elastic(every: int, beta: float) -> Rule:
    memory: dict[str, Any] = {}

    def rule(world: World, done: int) -> None:
        if done % every == 0:
            vectors = world.vectors()
            pulls = [beta / len(vectors) * (y - memory["x"]) for y in vectors]
            world.put([y - e for y, e in zip(vectors, pulls, strict=True)])
            memory["x"] = memory["x"] + torch.stack(pulls).sum(0)

    return _from_the_start(rule, memory)


def streaming(every: int, fragments: int, delay: int, mixing: float, rate: float, mu: float) -> Rule:
    """Fragment f leaves at f H / F in each period, and its outer step is taken in `delay` steps later."""
    memory: dict[str, Any] = {}
    move = nesterov(rate, mu)

    def rule(world: World, done: int) -> None:
        outer = memory.setdefault("outer", [{} for _ in range(fragments)])
        sent = memory.setdefault("sent", {})
        for f in range(fragments):
            if done % every == f * every // fragments:
                sent[f, done + delay] = mean(world.vectors())
        for f, mask in enumerate(world.masks(fragments)):
            y = sent.pop((f, done), None)
            if y is not None:
                memory["x"] = torch.where(mask, move(memory["x"], y, outer[f]), memory["x"])
                own = world.vectors()
                mixed = [mixing * memory["x"] + (1 - mixing) * v for v in own]
                world.put([torch.where(mask, m, v) for m, v in zip(mixed, own, strict=True)])

    return _from_the_start(rule, memory)


def after(steps: int, rule: Rule) -> Rule:
    """The rule, from so many steps on."""
    return lambda world, done: rule(world, done - steps) if done >= steps else None


def _from_the_start(rule: Rule, memory: dict[str, Any]) -> Rule:
    """Called once before the first step, to remember where the replicas start from."""

    def remembering(world: World, done: int) -> None:
        if done == 0:
            memory["x"] = world.vectors()[0]
        else:
            rule(world, done)

    return remembering


def simulate(
    task: RowsTask, ranks: int, optimizer: str, rule: Rule, steps: int, together: int, rows: int
) -> list[list[Arrays]]:
    """Every parameter of each replica after each step: [rank][step]. The first `together` steps are synchronous."""
    world = World(task, ranks, optimizer, rows)
    rule(world, 0)  # before the first step, for those that remember where it began
    history = []
    for step in range(steps):
        world.inner_step(step, together=step < together)
        rule(world, step + 1)
        history.append(world.arrays())
    return [list(of_rank) for of_rank in zip(*history, strict=True)]
