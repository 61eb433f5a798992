"""A parameter server, asynchronous: every push is applied on arrival, and nobody waits for the slowest worker.

Take it where workers differ in speed, come and go, or sit behind slow links. A gradient is some updates old when it
is applied; `--max-staleness` bounds by how many steps a worker may be ahead of the last one (Ho et al. 2013, stale
synchronous parallel: at 0 it is the synchronous gate), `--staleness-lr`, `--delay-compensation` and
`--delayed-momentum` make up for it (sources in `servers.update_rules` and `servers.delayed`).
`--collect K` makes an update of K pushes, whoever made them: with K workers and no staleness it is synchronous
training.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.optim import optimizers
from shoal.optim.optimizers import NamedParams
from shoal.replica import Replica, Step
from shoal.servers.delayed import DelayedNesterov
from shoal.servers.host import NOTHING
from shoal.servers.messages import Reply
from shoal.servers.update_rules import Arrivals
from shoal.sync.base import State
from shoal.sync.central import Central, Traffic
from shoal.wire.wire import Wire


class Errand:
    """One thread beside the loop, that does one thing at a time."""

    def __init__(self) -> None:
        self._todo: queue.Queue[Callable[[], Reply]] = queue.Queue(1)
        self._done: queue.Queue[Reply | BaseException] = queue.Queue(1)
        self.under_way = False
        threading.Thread(target=self._run, name="errand", daemon=True).start()

    def start(self, work: Callable[[], Reply]) -> None:
        """Begin it, when what was begun before has been waited for."""
        assert not self.under_way
        self.under_way = True
        self._todo.put(work)

    def wait(self) -> Reply:
        """What came of it; raises what it raised."""
        done = self._done.get()
        self.under_way = False
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


class Async(Central):
    """Pushes and pulls travel while the next step computes, so that a worker computes with parameters one push older.

    Alone, or at a staleness of 0, there is nothing to hide or no room for it, and a step waits for its own push.
    """

    all_agree = False

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.max_staleness = self.options.max_staleness
        self.errand = Errand()
        self.told = NOTHING
        self.staleness = 0
        self.rate = 0.0  # by which the last push was applied
        self.workers = wire.world_size

    @property
    def ahead(self) -> int:
        """The pushes of its own that a worker does not wait for."""
        return int(self.wire.world_size > 1 and self.max_staleness != 0)

    def policy(self, replica: Replica) -> Arrivals:
        """On arrival, or a few at a time."""
        options = self.options
        adaptive = self.config.train.optim != "sgd"
        policy = Arrivals(
            replica.schedule,
            collect=options.collect,
            staleness_lr=options.staleness_lr,
            delay_compensation=options.delay_compensation,
            share_power=0.5 if adaptive else 1.0,
        )
        policy.bound = -1 if options.max_staleness is None else options.max_staleness
        return policy

    def build(self, params: NamedParams) -> list[Optimizer]:
        """Delayed Nesterov in place of the optimizer, if it is asked for."""
        period = self.options.delayed_momentum
        if not period:
            return super().build(params)
        groups = optimizers.decay_groups(params, self.config.train.weight_decay)
        return [DelayedNesterov(groups, 0.0, period=period, momentum=optimizers.MOMENTUM)]

    def turn(self, replica: Replica, step: Step) -> None:
        """Send the gradients on their way; go on with what the push before brought back."""
        arrived = self._settle()
        finite = self._take(replica, step)
        needed = -1 if self.max_staleness is None else step.number + 1 + self.ahead - self.max_staleness
        exchange = self.servers.exchange(step, needed, self.told, skip=not finite)
        if arrived:
            self.servers.load()
        self.errand.start(exchange)
        if not self.ahead:
            self._settle()
            self.servers.load()
        step.learning_rate = self.rate

    def agree(self, numbers: Tensor) -> Tensor:
        """What this rank knows, and what the others told with their last pushes: nobody waits."""
        self.told = numbers.clone()
        others = self.servers.others
        return self.decided(numbers + others if others.numel() == numbers.numel() else numbers)

    @contextmanager
    def shared_model(self, replica: Replica) -> Iterator[None]:
        """The servers' parameters, once what is under way has arrived."""
        self._settle()
        with super().shared_model(replica):
            yield

    def state_dict(self) -> State:
        """Nothing: a checkpoint does not wait for other workers, of which each would lose what its codec left out."""
        return {}

    def finish(self, replica: Replica) -> None:
        """As every worker of servers, once what is under way has arrived."""
        self._settle()
        super().finish(replica)

    def tighten(self) -> str:
        """Half the staleness, down to the synchronous gate. Rank 0's server tells the others."""
        if self.max_staleness == 0:
            return ""
        bound = self.wire.world_size if self.max_staleness is None else self.max_staleness
        if self.wire.rank == 0 and self.host is not None:
            self.host.tighten(bound // 2)
        return f"workers may be {bound // 2} steps ahead of the last one"

    @property
    def evaluates_alone(self) -> bool:
        """Where nobody waits for a worker that may be gone."""
        return self.wire.world_size > 1

    def metrics(self) -> dict[str, float]:
        """Of this rank's last push: by how many updates it came late. And how many workers there are."""
        return {"sync/staleness": self.staleness, "sync/workers": self.workers}

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """Of the rank that sends most: one with a server. Delay compensation holds up to three copies a worker."""
        traffic, count, bound = Traffic.of(config, sizes), sizes.world_size, config.strategy.max_staleness
        most = traffic.most(count)
        backups = 3 * count * max(traffic.down) if config.strategy.delay_compensation else 0
        return replace(most, held=most.held + backups, staleness=count - 1 if bound is None else bound)

    def _settle(self) -> bool:
        """Wait for what is under way; whether there was something."""
        if not self.errand.under_way:
            return False
        pushed = self.errand.wait()
        self.staleness, self.workers = pushed.staleness, pushed.workers
        self.max_staleness = pushed.bound if pushed.bound >= 0 else None
        self.rate = pushed.rate
        return True

    def _take(self, replica: Replica, step: Step) -> bool:
        """The gradients, clipped by their own norm a label, for they are an update alone; whether they are finite."""
        own = torch.tensor(self.servers.take(), dtype=torch.float64)
        norm = replica.island.norm(own).item() / (step.own_fraction or 1.0)
        finite = replica.judge(step, norm)
        if finite:
            self.servers.clip(norm, replica.max_grad_norm)
        return finite
