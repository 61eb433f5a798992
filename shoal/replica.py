"""One replica: a placed model, its gradients over a share of a step's micro-batches, and its update."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from shoal.buckets import Buckets
from shoal.data.batches import Batch
from shoal.data.order import derive_seed
from shoal.island import Island
from shoal.layouts.base import Loss, Placed
from shoal.optim import NamedState
from shoal.precision import Policy

TINY = 1e-6  # beside a norm that divides, as in torch's clipping


@dataclass
class Shares:
    """Which micro-batches of a step each rank computes: `counts[r]` of them, contiguous, in the order of ranks."""

    counts: list[int]

    def of(self, rank: int) -> range:
        """The micro-batches of `rank`."""
        first = sum(self.counts[:rank])
        return range(first, first + self.counts[rank])


@dataclass
class Seconds:
    """Where the time of a step went, on this rank."""

    data: float = 0.0
    compute: float = 0.0
    communication: float = 0.0  # exposed: waited for, while nothing was computed
    optimizer: float = 0.0


@dataclass
class Replica:
    """A model with its gradients in buckets and its optimizers. `gradients` and `update` are the only doors."""

    placed: Placed
    island: Island
    loss: Loss  # that of `placed`, or what was compiled of it
    buckets: Buckets
    optimizers: list[torch.optim.Optimizer]
    policy: Policy
    device: torch.device
    seed: int
    schedule: Callable[[int], float]  # step -> learning rate
    max_grad_norm: float
    shares: Shares
    normalize: bool = False  # update by the direction of the gradient alone
    seconds: Seconds = field(default_factory=Seconds)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    nonfinite_steps: int = 0  # in a row
    labels: float = 1  # what the summed gradients are still to be divided by
    step: int = 0  # whose gradients are being taken, or were last
    step_labels: int = 0  # the labels of that step over all ranks
    own_labels: int = 0  # of these, the ones of this replica

    @property
    def rank(self) -> int:
        """Of those that share the micro-batches."""
        return self.island.rank

    @property
    def turns(self) -> int:
        """How many micro-batches each rank of the island computes in a step, those without samples too."""
        return max(self.shares.counts[rank] for rank in self.island.ranks)

    @property
    def model(self) -> nn.Module:
        """The model in its place."""
        return self.placed.model

    @property
    def params(self) -> list[tuple[str, nn.Parameter]]:
        """What this rank holds of every trained parameter, with its name; tied ones under their first name."""
        return [(piece.name, piece.local) for piece in self.placed.trained]

    @property
    def optimizer_state(self) -> NamedState:
        """The optimizers' state, named by parameter."""
        return NamedState(self.optimizers, self.params)

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward over this rank's share of `batch`, into the buckets.

        Returns the summed loss of each micro-batch of the step, float64 [V], zero where others compute it.
        Each loss is divided by the labels of the whole step, so the gradients only need to be added up.
        Dropout is seeded by (seed, step, micro-batch). Buckets are announced during the last backward pass. The
        ranks of an island take equally many turns: who has no micro-batch left takes one without samples.
        """
        losses = torch.zeros(len(batch.ids), dtype=torch.float64)
        share = self.shares.of(self.rank)
        together = [self.shares.of(rank) for rank in self.island.ranks]
        of_island = batch.ids[together[0].start : together[-1].stop]
        self.step, self.step_labels = batch.step, batch.labels
        self.own_labels = int(batch.samples.label_counts(of_island).sum())
        turns = self.turns
        for turn in range(turns):
            v = share.start + turn if turn < len(share) else None
            started = time.perf_counter()
            taken = batch.nothing() if v is None else batch.micro_batch(v)
            inputs = {k: t.to(self.device) for k, t in taken.items()}
            self.seconds.data += time.perf_counter() - started

            started, waited = time.perf_counter(), self.placed.waited()
            self.buckets.begin(v or 0, first=turn == 0, last=turn == turns - 1)
            self.placed.begin(last=turn == turns - 1)
            torch.manual_seed(derive_seed(self.seed, "dropout", batch.step, v or 0))
            with self.policy.autocast(self.device):
                loss = self.loss(self.model, inputs)
            (loss / max(1, batch.labels)).backward()
            if v is not None:
                losses[v] = loss.item()
            self.buckets.end()
            waited = self.placed.waited() - waited
            self.seconds.compute += time.perf_counter() - started - waited
            self.seconds.communication += waited
        return losses

    def update(self, step: int) -> None:
        """Clip the summed gradients by their one global norm, set the rate of `step`, and step the optimizers.

        A norm that is not finite leaves everything as it was. Every rank knows the same norm and so decides alike.
        """
        started = time.perf_counter()
        if self.labels != 1:
            for bucket in self.buckets:
                bucket.flat.div_(self.labels)
            self.labels = 1
        grads = [p.grad for _, p in self.params if p.grad is not None]
        norm = self.island.norm(get_total_norm(grads))
        self.grad_norm = norm.item()
        self.learning_rate = self.schedule(step)
        finite = torch.isfinite(norm).item()
        self.nonfinite_steps = 0 if finite else self.nonfinite_steps + 1
        if finite:
            if self.normalize:
                for bucket in self.buckets:
                    bucket.flat.div_(norm + TINY)
            elif self.max_grad_norm:
                clip_grads_with_norm_([p for _, p in self.params], self.max_grad_norm, norm)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate
                optimizer.step()
        self.seconds.optimizer += time.perf_counter() - started
