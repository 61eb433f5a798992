"""One replica: a placed model, its gradients over a share of a step's micro-batches, and its update."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from shoal.data.batches import Batch
from shoal.data.order import derive_seed
from shoal.layouts.base import MicroBatch, PlacedModel
from shoal.optim.optimizers import NamedState
from shoal.tensors.buckets import Buckets
from shoal.tensors.loss_scale import Scaler
from shoal.tensors.piece import Piece, named, trained
from shoal.tensors.precision import Policy
from shoal.wire.island import Island
from shoal.wire.mesh import Mesh

TINY = 1e-6  # beside a norm that divides, as in torch's clipping


@dataclass
class Shares:
    """Which micro-batches of a step each team of ranks computes: `counts[t]` of them, contiguous, in their order."""

    counts: list[int]

    def of(self, team: int) -> range:
        """The micro-batches of `team`."""
        first = sum(self.counts[:team])
        return range(first, first + self.counts[team])


@dataclass
class Seconds:
    """Where the time of a step went, on this rank."""

    data: float = 0.0
    compute: float = 0.0
    communication: float = 0.0  # exposed: waited for, while nothing was computed
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.data + self.compute + self.communication + self.optimizer


@dataclass
class Step:
    """One step on this rank: what `Replica.gradients` found, and what became of it."""

    number: int
    labels: int  # of the step, over all ranks
    own_labels: int  # of these, the ones of this replica
    losses: Tensor  # float64 [V]: the summed loss of each micro-batch, zero where others report it
    divisor: float = 1.0  # of the summed gradients, where losses were not divided by the labels before
    seconds: Seconds = field(default_factory=Seconds)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    skipped: bool = False  # nothing was updated: the gradient was not finite

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of `kind`, without those timed as another kind within it."""
        started, inner = time.perf_counter(), self.seconds.total
        yield
        taken = time.perf_counter() - started - (self.seconds.total - inner)
        setattr(self.seconds, kind, getattr(self.seconds, kind) + taken)

    @property
    def own_fraction(self) -> float:
        """The part of the step's labels that are this replica's."""
        return self.own_labels / max(1, self.labels)


@dataclass
class Replica:
    """A model with its gradients in buckets and its optimizers. `gradients` and `update` are the only doors."""

    placed: PlacedModel
    mesh: Mesh
    buckets: Buckets
    optimizers: list[torch.optim.Optimizer]
    updated: list[Piece]  # what these change: the trained pieces, or copies of them
    policy: Policy
    seed: int
    schedule: Callable[[int], float]  # step -> learning rate
    max_grad_norm: float
    shares: Shares
    normalize: bool = False  # update by the direction of the gradient alone
    nonfinite_steps: int = 0  # in a row, without those that a lower loss scale may have saved
    now: int = 0  # the number of the step whose gradients are being computed, or were last

    def __post_init__(self) -> None:
        self.island = Island(self.mesh)
        self.scaler = Scaler(self.policy)
        self._shares_before_pause: Shares | None = None

    @property
    def is_cut(self) -> bool:
        """Whether several ranks hold it together."""
        return len(self.island) > 1

    @property
    def turns(self) -> int:
        """How many micro-batches each team of the island computes in a step, those without samples too."""
        return max(self.shares.counts[team] for team in self.island.teams)

    @property
    def model(self) -> nn.Module:
        """The model in its place."""
        return self.placed.model

    @property
    def params(self) -> list[tuple[str, nn.Parameter]]:
        """What this rank holds of every trained parameter, with its name; tied ones under their first name."""
        return named(trained(self.placed.pieces))

    @property
    def optimizer_state(self) -> NamedState:
        """The optimizers' state, named by parameter."""
        return NamedState(self.optimizers, named(self.updated))

    def begin(self, number: int) -> None:
        """Note the number of the step whose gradients come next: strategies ask for it as buckets complete."""
        self.now = number

    def gradients(self, batch: Batch) -> Step:
        """Forward and backward over this rank's share of `batch`, into the buckets.

        Each loss is divided by the labels of the whole step, so the gradients only need to be added up.
        Dropout is seeded by (seed, step, micro-batch). Buckets are announced during the last backward pass. The
        teams of an island take equally many turns: who has no micro-batch left takes one without samples.
        """
        losses = torch.zeros(len(batch.ids), dtype=torch.float64)
        share = self.shares.of(self.island.team)
        together = [self.shares.of(team) for team in self.island.teams]
        own_labels = batch.label_count(slice(together[0].start, together[-1].stop))
        step = Step(batch.step, batch.labels, own_labels, losses)
        self.begin(batch.step)
        numbers = [share.start + turn if turn < len(share) else None for turn in range(self.turns)]
        turns = [[v] for v in numbers] if self.placed.singly else [numbers]
        self.placed.before_forward()
        for turn in turns:
            started = time.perf_counter()
            micro_batches = [self._micro_batch(batch, v) for v in turn]
            step.seconds.data += time.perf_counter() - started

            started, waited = time.perf_counter(), self.mesh.seconds_waited
            last = turn is turns[-1]
            self.buckets.begin(turn[0] or 0, first=turn is turns[0], last=last)
            self.buckets.scale = self.scaler.scale
            scale = self.scaler.scale / max(1, batch.labels)
            found = self.placed.forward_backward(micro_batches, scale, self._autocast, last=last)
            for v, loss in zip(turn, found, strict=True):
                if v is not None:
                    losses[v] = loss
            self.buckets.end()
            waited = self.mesh.seconds_waited - waited
            step.seconds.compute += time.perf_counter() - started - waited
            step.seconds.communication += waited
        return step

    def _micro_batch(self, batch: Batch, v: int | None) -> MicroBatch:
        collated = batch.empty_micro_batch() if v is None else batch.micro_batch(v)
        inputs = {name: tensor.to(self.mesh.device) for name, tensor in collated.items()}
        return MicroBatch(inputs, derive_seed(self.seed, "dropout", batch.step, v or 0))

    def _autocast(self) -> AbstractContextManager[object]:
        return self.policy.autocast(self.mesh.device)

    def update(self, step: Step, fraction: float = 1.0) -> None:
        """Clip the summed gradients by their one global norm, set the rate of `step`, and step the optimizers.

        Gradients are first divided by the step's divisor times `fraction`: the part of the step that they are of.
        A norm that is not finite leaves everything as it was. Every rank knows the same norm and so decides alike.
        """
        started = time.perf_counter()
        if (divisor := step.divisor * fraction) != 1:
            for bucket in self.buckets:
                bucket.flat.div_(divisor)
        grads = [p.grad for _, p in self.params if p.grad is not None]
        norm = self.island.norm(get_total_norm(grads))
        if self.judge(step, norm.item()):
            if self.normalize:
                for bucket in self.buckets:
                    bucket.flat.div_(norm + TINY)
            elif self.max_grad_norm:
                clip_grads_with_norm_([p for _, p in self.params], self.max_grad_norm, norm)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = step.learning_rate
                optimizer.step()
        step.seconds.optimizer += time.perf_counter() - started

    def judge(self, step: Step, norm: float) -> bool:
        """Whether to take `step`, whose gradient has this global norm: it is finite. The loss scale follows.

        Whoever updates the parameters elsewhere calls it in place of `update`.
        """
        step.learning_rate = self.schedule(step.number)
        step.grad_norm, step.skipped = norm, not math.isfinite(norm)
        can_lower = self.scaler.update(finite=not step.skipped)
        if not step.skipped:
            self.nonfinite_steps = 0
        elif not can_lower:
            self.nonfinite_steps += 1
        return not step.skipped

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all pieces of the replica."""
        return len(self.island) == 1

    @property
    def rank(self) -> int:
        """Which of the ranks that hold this replica together this one is."""
        return self.island.rank

    def norm(self, own: Tensor) -> Tensor:
        """The norm over all pieces of the replica, of which this rank's have the norm `own`."""
        return self.island.norm(own)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks that hold this replica together, in place."""
        return self.island.sum(numbers)

    def continue_from(self, nonfinite_steps: int, scaler: dict[str, float] | dict[str, Tensor]) -> None:
        """Take up the count of steps in a row that were not finite, and the state of the loss scale."""
        self.nonfinite_steps = nonfinite_steps
        self.scaler.load_state_dict(scaler)

    def replace_optimizers(self, made: list[torch.optim.Optimizer]) -> None:
        """Have a strategy's own optimizers update the parameters, by gradients that are not clipped."""
        self.optimizers, self.max_grad_norm = made, 0.0

    def pause(self) -> None:
        """Compute no micro-batch until `resume`."""
        if self._shares_before_pause is None:
            self._shares_before_pause = self.shares
            counts = [0 if team == self.island.team else c for team, c in enumerate(self.shares.counts)]
            self.shares = Shares(counts)

    def resume(self) -> None:
        """Compute the share from before `pause` again."""
        if self._shares_before_pause is not None:
            self.shares, self._shares_before_pause = self._shares_before_pause, None
