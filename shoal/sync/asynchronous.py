"""A parameter server, asynchronous: every push is applied on arrival, and nobody waits for the slowest worker.

Use it where workers differ in speed, come and go, or sit behind slow links. A gradient is some updates old when it is
applied. `--max-staleness` bounds by how many steps a worker may be ahead of the last one (Ho et al. 2013, stale
synchronous parallel; 0 is synchronous); `--staleness-lr`, `--delay-compensation` and `--delayed-momentum` make up for
staleness (sources in `servers.update_rules` and `servers.delayed`). `--collect K` makes one update of K pushes of any
workers: with K workers and no staleness it is synchronous training.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.optim import Optimizer

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.optim import optimizers
from shoal.optim.optimizers import NamedParams
from shoal.replica import Replica, Step
from shoal.servers.delayed import DelayedNesterov
from shoal.servers.messages import Reply
from shoal.servers.update_rules import Arrivals
from shoal.sync.base import Guardable, State
from shoal.sync.server_strategy import ServerStrategy, Traffic
from shoal.wire.waits import WAITS
from shoal.wire.wire import Wire


class BackgroundCall:
    """A thread beside the loop that makes one call at a time."""

    def __init__(self) -> None:
        self._todo: queue.Queue[Callable[[], Reply]] = queue.Queue(1)
        self._done: queue.Queue[Reply | BaseException] = queue.Queue(1)
        self.running = False
        threading.Thread(target=self._run, name="call", daemon=True).start()

    def start(self, work: Callable[[], Reply]) -> None:
        """Begin a call. The one before must have been waited for."""
        assert not self.running
        self.running = True
        self._todo.put(work)

    def wait(self) -> Reply:
        """Its result; raises what it raised."""
        with WAITS.on("an answer of the servers"):
            done = self._done.get()
        self.running = False
        if isinstance(done, BaseException):
            raise done
        return done

    def _run(self) -> None:
        while True:
            work = self._todo.get()
            try:
                self._done.put(work())
            except BaseException as error:  # handed to the loop, which raises it
                self._done.put(error)


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """Of the rank that sends most: one with a server. Delay compensation holds up to three copies a worker."""
    traffic, count, bound = Traffic.of(config, sizes), sizes.world_size, config.strategy.max_staleness
    most = traffic.most(count)
    backups = 3 * count * max(traffic.down) if config.strategy.delay_compensation else 0
    return replace(most, held=most.held + backups, staleness=count - 1 if bound is None else bound)


class Async(ServerStrategy, Guardable):
    """Pushes and pulls overlap the computation of the next step, whose parameters are therefore one push older.

    With one worker there is nothing to overlap, and a staleness of 0 allows none: a step then waits for its own push.
    """

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire, wait=False, alone=wire.world_size > 1)
        self.max_staleness = self.options.max_staleness
        self.under_way = BackgroundCall()
        self.staleness = 0
        self.rate = 0.0  # by which the last push was applied
        self.workers = wire.world_size

    @property
    def ahead(self) -> int:  # type: ignore[override]
        """The pushes of its own that a worker does not wait for."""
        return int(self._wire.world_size > 1 and self.max_staleness != 0)

    def update_rule(self, replica: Replica) -> Arrivals:
        options = self.options
        adaptive = self.config.train.optim != "sgd"
        rule = Arrivals(
            replica.schedule,
            collect=options.collect,
            staleness_lr=options.staleness_lr,
            delay_compensation=options.delay_compensation,
            share_power=0.5 if adaptive else 1.0,
        )
        rule.bound = -1 if options.max_staleness is None else options.max_staleness
        return rule

    def build(self, params: NamedParams) -> list[Optimizer]:
        period = self.options.delayed_momentum
        if not period:
            return super().build(params)
        groups = optimizers.decay_groups(params, self.config.train.weight_decay)
        return [DelayedNesterov(groups, 0.0, period=period, momentum=optimizers.MOMENTUM)]

    def exchange(self, replica: Replica, step: Step) -> None:
        # Start to push the gradients, and continue with the parameters that the push before brought back.
        arrived = self._await_exchange()
        finite = self._copy_gradients(replica, step)
        needed = -1 if self.max_staleness is None else step.number + 1 + self.ahead - self.max_staleness
        exchange = self.servers.exchange(step, needed, self.members.numbers, skip=not finite)
        if arrived:
            self.servers.load()
        self.under_way.start(exchange)
        if not self.ahead:
            self._await_exchange()
            self.servers.load()
        step.learning_rate = self.rate

    @contextmanager
    def shared_model(self, replica: Replica) -> Iterator[None]:
        self._await_exchange()
        with super().shared_model(replica):
            yield

    def state_dict(self) -> State:
        # A checkpoint does not wait for other workers, so it cannot hold what their codecs left out.
        return {}

    def _leave(self, replica: Replica) -> None:
        self._await_exchange()
        super()._leave(replica)

    def tighten(self) -> str:
        # Half the staleness, down to synchronous training. Rank 0's server passes it on to the others.
        if self.max_staleness == 0:
            return ""
        bound = self._wire.world_size if self.max_staleness is None else self.max_staleness
        if self._wire.rank == 0 and self.host is not None:
            self.host.tighten(bound // 2)
        return f"workers may be {bound // 2} steps ahead of the last one"

    def metrics(self) -> dict[str, float]:
        # By how many updates this rank's last push came late, and how many workers there are.
        return {"sync/staleness": self.staleness, "sync/workers": self.workers}

    def _await_exchange(self) -> bool:
        """Wait for the exchange under way; returns whether there was one."""
        if not self.under_way.running:
            return False
        pushed = self.under_way.wait()
        self.encoder.commit()
        self.staleness, self.workers = pushed.staleness, pushed.workers
        self.max_staleness = pushed.bound if pushed.bound >= 0 else None
        self.rate = pushed.rate
        return True

    def _copy_gradients(self, replica: Replica, step: Step) -> bool:
        """Copy the gradients, clipped by their own norm per label, as each is an update; returns whether finite."""
        own = torch.tensor(self.servers.copy_gradients(), dtype=torch.float64)
        norm = replica.norm(own).item() / (step.own_fraction or 1.0)
        finite = replica.judge(step, norm)
        if finite:
            self.servers.clip(norm, replica.max_grad_norm)
        return finite
