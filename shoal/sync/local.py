"""Local training: each replica updates alone for some steps, then they agree on shared parameters.

Use it where a step's gradients take longer to send than to compute: bytes fall by the number of steps between two
syncs. Replicas drift apart meanwhile; more than some tens of steps need a smaller rate or an outer momentum
(`diloco`). Each replica keeps the state of its own inner optimizers.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.codecs.sums import Advance, EncodedSums
from shoal.config import RunConfig
from shoal.config.strategy import StrategyConfig
from shoal.cost import Cost, Sizes
from shoal.replica import Replica, Step
from shoal.sync.allreduce import AllReduce
from shoal.sync.base import Changed, Guardable, State, Sync
from shoal.sync.outer import BlockMomentum, Elastic, Mean, Outer, SlowMo
from shoal.sync.parameters import apart, averaged, mean, read, write
from shoal.sync.shared import Shared
from shoal.wire.wire import Wire

ELASTICITY = 0.9
SYNCHRONOUS = "synchronous."
SLOW_MOMENTUM = 0.7


class Period:
    """When to sync: every so many steps, every so many tokens, or never before the end."""

    def __init__(self, text: str) -> None:
        self.tokens = int(text.removesuffix("tokens")) if text.endswith("tokens") else None
        self.steps = None if self.tokens or text == "end" else int(text)
        self.seen = 0  # tokens since the last sync

    def due(self, done: int, labels: int, offset: int = 0) -> bool:
        """Whether to sync after `done` local steps, the last one of `labels` tokens over all ranks."""
        if self.tokens is None:
            return self.steps is not None and done % self.steps == offset
        self.seen += labels
        if self.seen < self.tokens:
            return False
        self.seen = 0
        return True


def period_of(options: StrategyConfig) -> Period:
    """A new period, from the options."""
    return Period(options.sync_every or options.traits.period)


@dataclass
class FragmentSum:
    """The deltas of one fragment: their sums are started after `start` local steps and applied after `end`.

    A sum takes `rounds` exchanges. Every rank starts each of them after the same step, whether the one before is done
    or not: all ranks must start their exchanges in one order, the loop's own sums included.
    """

    fragment: int
    start: int
    end: int
    deltas: list[Tensor]
    advance: list[Advance]
    rounds: list[int]

    def start_due(self, done: int) -> None:
        """Start the exchanges that are due after `done` steps: they are spread evenly over the steps."""
        length = self.end - self.start
        for advance, rounds in zip(self.advance, self.rounds, strict=True):
            if done in [self.start + -(-length * i // rounds) for i in range(1, rounds)]:
                advance()

    def wait(self) -> None:
        """Wait until the deltas are the sums over the ranks."""
        for work in [advance() for advance in self.advance]:
            work.wait()
        self.advance, self.rounds = [], []


def cost(config: RunConfig, sizes: Sizes, *, outer: bool | None = None) -> Cost:
    """The parameters once in a period; for an `outer` rule (None: by the options) they and its momentum are held."""
    every = period_of(config.strategy).steps or math.inf
    outer = Local.has_outer(config.strategy) if outer is None else outer
    held = 2 * sizes.nbytes if outer else 0
    held += EncodedSums.bytes_held(config.strategy, sizes)
    sent = EncodedSums.bytes_sent(config.strategy, sizes) / every
    return Cost(sent=sent, held=held, staleness=config.strategy.overlap_steps or 0)


class Local(Sync, Guardable):
    """Periodic averaging, with an outer rule on request.

    Before `local_after` steps it is all-reduce (post-local SGD). With `group_size` the ranks average within groups
    of neighbours every `sync_every` steps, and all of them every `global_every` steps. With `fragments` the buckets
    are dealt out to that many fragments, synced in turn; with `overlap_steps` a sum may take that many steps.
    """

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        self.period = period_of(self.options)
        self.halvings = 0  # of the period, when the guard asked for it
        self.synchronous = AllReduce(config, wire)
        self.sums = EncodedSums(self.options, wire, config.train.seed)
        self.neighbours = wire.neighbours(self.options.group_size) if self.options.group_size else wire
        self.shared: list[Shared] = []  # none where a sync is the plain mean of the parameters
        self.under_way: list[FragmentSum] = []

    def attach(self, replica: Replica) -> None:
        self.synchronous.attach(replica)
        replica.buckets.listen(
            on_complete=lambda bucket: (
                None if self._alone(replica.now) else self.synchronous.send(replica, bucket)
            )
        )
        self._begin(replica)

    def step(self, replica: Replica, step: Step) -> None:
        if not self._alone(step.number):
            self.synchronous.step(replica, step)
            if self._alone(step.number + 1):
                self._begin(replica)
            return
        update_alone(replica, step)
        done = step.number + 1 - self.options.local_after
        with step.timed("communication"):
            if self.shared:
                self._sync_shared(done, step)
            else:
                self._average(done, replica, step)

    def tighten(self) -> str | None:
        if self.period.steps is None:
            return None
        half = self.period.steps // 2
        if half < max(1, self.options.fragments) or half <= (self.options.overlap_steps or 0):
            return None
        self.period.steps, self.halvings = half, self.halvings + 1
        return f"a sync every {self.period.steps} steps from now on"

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        return averaged(replica, self._wire)

    def metrics(self) -> dict[str, float]:
        # From the mean of all at the last sync; with an outer rule from the parameters shared last, since a codec may
        # leave the mean unknown.
        return {"sync/drift": self.drift}

    def state_dict(self) -> State:
        # What is shared, its momentum, the sums under way, what the codec left out, the tokens since the last sync.
        state = {"period": torch.tensor([self.period.seen, self.halvings])}
        for i, shared in enumerate(self.shared):
            state |= {f"shared.{i}.{name}": tensor for name, tensor in shared.state_dict().items()}
        for sums in self.under_way:
            self._wait(sums)
            state[f"travelling.{sums.fragment}"] = torch.tensor([sums.end])
            for i, delta in zip(self._fragment(sums.fragment), sums.deltas, strict=True):
                state[f"travelling.{sums.fragment}.{i}"] = delta[: self.shared[i].numel]
        before = {f"{SYNCHRONOUS}{name}": t for name, t in self.synchronous.state_dict().items()}
        return state | self.sums.state_dict() | before

    def load_state_dict(self, states: Sequence[State]) -> None:
        # What is shared was the same on all ranks; what the codec left out is refitted by `EncodedSums`.
        state = self._own_state(states)
        scale = self._wire.world_size / len(states)  # of sums over the ranks, divided by today's count
        self.period.seen, halvings = state["period"].tolist()
        for _ in range(halvings):
            self.tighten()
        for i, shared in enumerate(self.shared):
            prefix = f"shared.{i}."
            shared.load_state_dict(
                {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            )
        for f in range(self.options.fragments):
            if f"travelling.{f}" in state:
                sums = [state[f"travelling.{f}.{i}"] * scale for i in self._fragment(f)]
                deltas = [self.shared[i].padded(s) for i, s in zip(self._fragment(f), sums, strict=True)]
                end = int(state[f"travelling.{f}"])
                self.under_way.append(FragmentSum(f, end, end, deltas, [], []))
        self.sums.load_state_dict(Changed(states, partial(_scaled, scale=scale)))
        self.synchronous.load_state_dict(Changed(states, _of_synchronous))

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        """Whether a sync is more than the mean of the parameters, so that a copy must be remembered."""
        plain = options.averaging == "mean" and options.codec == "none" and options.fragments == 1
        return not plain or bool(options.overlap_steps)

    def outer(self) -> Outer:
        """A new outer rule, from the options."""
        world_size = self._wire.world_size
        if self.options.averaging == "slowmo":
            return self._rule(SlowMo, 1.0, SLOW_MOMENTUM)
        if self.options.averaging == "bmuf":
            return self._rule(BlockMomentum, 1.0, 1 - 1 / world_size)
        if self.options.averaging == "elastic":
            return Elastic(self.options.outer_lr or ELASTICITY, world_size)
        return Mean(1.0, 0.0)

    def _rule(self, rule: type[Outer], rate: float, momentum: float) -> Outer:
        """`rule` with the rate and the momentum of the options, by default with these."""
        asked = self.options.outer_momentum
        return rule(self.options.outer_lr or rate, momentum if asked is None else asked)

    def _alone(self, step: int) -> bool:
        return step >= self.options.local_after

    def _own_state(self, states: Sequence[State]) -> State:
        """Of what all ranks have saved, the state that this one continues with; what is shared is alike in all."""
        return states[self._wire.rank if len(states) == self._wire.world_size else 0]

    def _begin(self, replica: Replica) -> None:
        if self.has_outer(self.options):
            mixing = self.options.mixing or 1.0
            self.shared = [Shared(bucket, self.outer(), mixing) for bucket in replica.buckets]

    def _average(self, done: int, replica: Replica, step: Step) -> None:
        """Sync as the plain mean of the parameters, of all ranks or of this one's neighbours."""
        everyone = self.options.global_every is not None and done % self.options.global_every == 0
        if not (self.period.due(done, step.labels) or everyone):
            return
        wire = self._wire if everyone else self.neighbours
        means = mean(replica, wire)
        own = [read(bucket) for bucket in replica.buckets]
        self.drift = apart([a - b for a, b in zip(own, means, strict=True)], means)
        for bucket, flat in zip(replica.buckets, means, strict=True):
            write(bucket, flat)

    def _sync_shared(self, done: int, step: Step) -> None:
        """Start the sums of the fragments that are due, and apply those whose time has come."""
        count = self.options.fragments
        for f in range(count):
            offset = f * (self.period.steps or 0) // count
            # A fragment may still be under way where the guard has shortened the period.
            under_way = any(sums.fragment == f for sums in self.under_way)
            if self.period.due(done, step.labels, offset) and not under_way:
                self.under_way.append(self._start(f, done))
        for sums in self.under_way:
            if done < sums.end:
                sums.start_due(done)
        for sums in [each for each in self.under_way if each.end == done]:
            self.under_way.remove(sums)
            self._wait(sums)
            parts = [self.shared[i] for i in self._fragment(sums.fragment)]
            means = [delta.div_(self._wire.world_size) for delta in sums.deltas]
            for shared, delta in zip(parts, means, strict=True):
                shared.outer_step(delta, step.learning_rate)

    def _wait(self, sums: FragmentSum) -> None:
        sums.wait()
        self.sums.commit(*map(str, self._fragment(sums.fragment)))

    def _start(self, fragment: int, done: int) -> FragmentSum:
        parts = [(i, self.shared[i]) for i in self._fragment(fragment)]
        deltas = [shared.delta() for _, shared in parts]
        self.drift = apart(deltas, [shared.flat for _, shared in parts])
        advance = [
            self.sums.start_sum(str(i), delta, shared.bucket.shapes)
            for (i, shared), delta in zip(parts, deltas, strict=True)
        ]
        rounds = [self.sums.rounds(str(i)) for i, _ in parts]
        return FragmentSum(fragment, done, done + (self.options.overlap_steps or 0), deltas, advance, rounds)

    def _fragment(self, fragment: int) -> range:
        """The buckets of a fragment: every `fragments`-th one, so that each holds layers of all depths."""
        return range(fragment, len(self.shared), self.options.fragments)


def _scaled(state: State, scale: float) -> State:
    return {n: t * scale if n.endswith("residual") and scale != 1 else t for n, t in state.items()}


def _of_synchronous(state: State) -> State:
    return {n.removeprefix(SYNCHRONOUS): t for n, t in state.items() if n.startswith(SYNCHRONOUS)}


def update_alone(replica: Replica, step: Step) -> None:
    """Update one replica by its own micro-batches: by their gradients per label of their own."""
    replica.update(step, step.own_fraction or 1)
