"""Local training: each replica updates alone for some steps, then they agree on shared parameters.

Use it where a step's gradients take longer to send than to compute: bytes fall by the number of steps between two
syncs. Replicas drift meanwhile; more than some tens of steps need a smaller rate or an outer momentum (`diloco`).
The state of the inner optimizers stays with each replica.
"""

import math
import time
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
from shoal.sync.base import Changed, State, Sync
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
        """Whether to sync, with `done` local steps taken, the last one of `labels` tokens over all ranks."""
        if self.tokens is None:
            return self.steps is not None and done % self.steps == offset
        self.seen += labels
        if self.seen < self.tokens:
            return False
        self.seen = 0
        return True


def period_of(options: StrategyConfig) -> Period:
    """A new period, as the options say."""
    return Period(options.sync_every or options.own_period)


@dataclass
class Journey:
    """The deltas of one fragment, sent after `departs` local steps and applied after `arrives`; each takes `rounds`.

    Every rank starts a round after the same step, whether the round before is done or not: all ranks must start
    their exchanges in one order, the loop's own sums included.
    """

    fragment: int
    departs: int
    arrives: int
    deltas: list[Tensor]
    finish: list[Advance]
    rounds: list[int]

    def travel(self, done: int) -> None:
        """Start the rounds that are due after `done` steps: all have an equal share of the steps."""
        length = self.arrives - self.departs
        for finish, rounds in zip(self.finish, self.rounds, strict=True):
            if done in [self.departs + -(-length * i // rounds) for i in range(1, rounds)]:
                finish()

    def complete(self) -> None:
        """Wait until the deltas are the sums over the ranks."""
        for work in [finish() for finish in self.finish]:
            work.wait()
        self.finish, self.rounds = [], []


class Local(Sync):
    """Periodic averaging, with an outer rule on request.

    Before `local_after` steps it is all-reduce (post-local SGD). With `group_size` the ranks average within groups
    of neighbours every `sync_every` steps, and all of them every `global_every` steps. With `fragments` the buckets
    are dealt out to so many parts, each synced in its turn; with `overlap_steps` what is sent may travel so long.
    """

    replicas_differ = True

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.options = config.strategy
        self.period = period_of(self.options)
        self.halvings = 0  # of the period, when the guard asked for it
        self.synchronous = AllReduce(config, wire)
        self.exchange = EncodedSums(self.options, wire, config.train.seed)
        self.neighbours = wire.neighbours(self.options.group_size) if self.options.group_size else wire
        self.shared: list[Shared] = []  # none where a sync is the plain mean of the parameters
        self.travelling: list[Journey] = []

    def attach(self, replica: Replica) -> None:
        """Have gradients sent while training is still synchronous, and remember where the replicas start from."""
        self.synchronous.attach(replica)
        send = replica.buckets.on_complete
        replica.buckets.on_complete = lambda bucket: None if self._alone(replica.now) else send(bucket)
        self._begin(replica)

    def step(self, replica: Replica, step: Step) -> None:
        """Update alone, and sync what is due."""
        if not self._alone(step.number):
            self.synchronous.step(replica, step)
            if self._alone(step.number + 1):
                self._begin(replica)
            return
        update_alone(replica, step)
        done = step.number + 1 - self.options.local_after
        started = time.perf_counter()
        if self.shared:
            self._sync_shared(done, step)
        else:
            self._average(done, replica, step)
        step.seconds.communication += time.perf_counter() - started

    def tighten(self) -> str | None:
        """Sync twice as often."""
        if self.period.steps is None:
            return None
        half = self.period.steps // 2
        if half < max(1, self.options.fragments) or half <= (self.options.overlap_steps or 0):
            return None
        self.period.steps, self.halvings = half, self.halvings + 1
        return f"a sync every {self.period.steps} steps from now on"

    def shared_model(self, replica: Replica) -> AbstractContextManager[None]:
        """The mean of all replicas."""
        return averaged(replica, self.wire)

    def metrics(self) -> dict[str, float]:
        """How far this replica was from the mean of all at the last sync, as a part of its norm.

        With an outer rule, from the parameters shared last: the mean may be known by its codec only.
        """
        return {"sync/drift": self.drift}

    def state_dict(self) -> State:
        """What is shared, its momentum, what travels, what the codec left out, and the tokens since the last sync."""
        state = {"period": torch.tensor([self.period.seen, self.halvings])}
        for i, shared in enumerate(self.shared):
            state |= {f"shared.{i}.{name}": tensor for name, tensor in shared.state_dict().items()}
        for journey in self.travelling:
            journey.complete()
            state[f"travelling.{journey.fragment}"] = torch.tensor([journey.arrives])
            for i, delta in zip(self._fragment(journey.fragment), journey.deltas, strict=True):
                state[f"travelling.{journey.fragment}.{i}"] = delta[: self.shared[i].numel]
        before = {f"{SYNCHRONOUS}{name}": t for name, t in self.synchronous.state_dict().items()}
        return state | self.exchange.state_dict() | before

    def load_state_dict(self, states: Sequence[State]) -> None:
        """What is shared was the same on all ranks; what the codec left out follows the exchange's rule."""
        state = self._taken_up(states)
        scale = self.wire.world_size / len(states)  # of sums over the ranks, divided by today's count
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
                arrives = int(state[f"travelling.{f}"])
                self.travelling.append(Journey(f, arrives, arrives, deltas, [], []))
        self.exchange.load_state_dict(Changed(states, partial(_scaled, scale=scale)))
        self.synchronous.load_state_dict(Changed(states, _of_synchronous))

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """The parameters once in a period; for an outer rule they and its momentum are held."""
        every = period_of(config.strategy).steps or math.inf
        held = 2 * sizes.nbytes if cls.has_outer(config.strategy) else 0
        held += EncodedSums.bytes_held(config.strategy, sizes)
        sent = EncodedSums.bytes_sent(config.strategy, sizes) / every
        return Cost(sent=sent, held=held, staleness=config.strategy.overlap_steps or 0)

    @classmethod
    def has_outer(cls, options: StrategyConfig) -> bool:
        """Whether a sync is more than the mean of the parameters, so that a copy must be remembered."""
        plain = options.averaging == "mean" and options.codec == "none" and options.fragments == 1
        return not plain or bool(options.overlap_steps)

    def outer(self) -> Outer:
        """A new outer rule, as the options say."""
        world_size = self.wire.world_size
        if self.options.averaging == "slowmo":
            return self._asked(SlowMo, 1.0, SLOW_MOMENTUM)
        if self.options.averaging == "bmuf":
            return self._asked(BlockMomentum, 1.0, 1 - 1 / world_size)
        if self.options.averaging == "elastic":
            return Elastic(self.options.outer_lr or ELASTICITY, world_size)
        return Mean(1.0, 0.0)

    def _asked(self, rule: type[Outer], rate: float, momentum: float) -> Outer:
        """`rule` with the rate and the momentum of the options, or else with these."""
        asked = self.options.outer_momentum
        return rule(self.options.outer_lr or rate, momentum if asked is None else asked)

    def _alone(self, step: int) -> bool:
        return step >= self.options.local_after

    def _taken_up(self, states: Sequence[State]) -> State:
        """Of what all ranks have saved, the shared part that this one goes on with: it is alike on all."""
        return states[self.wire.rank if len(states) == self.wire.world_size else 0]

    def _begin(self, replica: Replica) -> None:
        if self.has_outer(self.options):
            mixing = self.options.mixing or 1.0
            self.shared = [Shared(bucket, self.outer(), mixing) for bucket in replica.buckets]

    def _average(self, done: int, replica: Replica, step: Step) -> None:
        """Sync as the plain mean of the parameters, of all ranks or of this one's neighbours."""
        everyone = self.options.global_every is not None and done % self.options.global_every == 0
        if not (self.period.due(done, step.labels) or everyone):
            return
        wire = self.wire if everyone else self.neighbours
        before = wire.bytes_sent
        means = mean(replica, wire)
        own = [read(bucket) for bucket in replica.buckets]
        self.drift = apart([a - b for a, b in zip(own, means, strict=True)], means)
        for bucket, flat in zip(replica.buckets, means, strict=True):
            write(bucket, flat)
        if wire is not self.wire:
            self.wire.bytes_sent += wire.bytes_sent - before

    def _sync_shared(self, done: int, step: Step) -> None:
        """Send the fragments that are due on their way, and take in those that arrive."""
        count = self.options.fragments
        for f in range(count):
            offset = f * (self.period.steps or 0) // count
            # A fragment may still be under way where the guard has shortened the period.
            under_way = any(journey.fragment == f for journey in self.travelling)
            if self.period.due(done, step.labels, offset) and not under_way:
                self.travelling.append(self._start(f, done))
        for journey in self.travelling:
            if done < journey.arrives:
                journey.travel(done)
        for journey in [each for each in self.travelling if each.arrives == done]:
            self.travelling.remove(journey)
            journey.complete()
            parts = [self.shared[i] for i in self._fragment(journey.fragment)]
            means = [delta.div_(self.wire.world_size) for delta in journey.deltas]
            for shared, delta in zip(parts, means, strict=True):
                shared.settle(delta, step.learning_rate)

    def _start(self, fragment: int, done: int) -> Journey:
        parts = [(i, self.shared[i]) for i in self._fragment(fragment)]
        deltas = [shared.delta() for _, shared in parts]
        self.drift = apart(deltas, [shared.flat for _, shared in parts])
        finish = [
            self.exchange.start_sum(str(i), delta, shared.bucket.shapes)
            for (i, shared), delta in zip(parts, deltas, strict=True)
        ]
        rounds = [self.exchange.rounds(str(i)) for i, _ in parts]
        return Journey(fragment, done, done + (self.options.overlap_steps or 0), deltas, finish, rounds)

    def _fragment(self, fragment: int) -> range:
        """The buckets of a fragment: every so-manieth one, so that each holds layers of all depths."""
        return range(fragment, len(self.shared), self.options.fragments)


def _scaled(state: State, scale: float) -> State:
    return {n: t * scale if n.endswith("residual") and scale != 1 else t for n, t in state.items()}


def _of_synchronous(state: State) -> State:
    return {n.removeprefix(SYNCHRONOUS): t for n, t in state.items() if n.startswith(SYNCHRONOUS)}


def update_alone(replica: Replica, step: Step) -> None:
    """The update of one replica by its own micro-batches: their gradients a label of their own."""
    replica.update(step, step.own_fraction or 1)
