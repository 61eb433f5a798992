"""Workers and servers in one process, in a time that a script makes: what happens is the same in every run."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.servers.core import ParameterServer, Push

Gradient = Callable[
    [int, int, Tensor], Tensor
]  # (worker, step, parameters [n]) -> its share of the gradient [n]
Duration = Callable[[int, int], float]  # (worker, step) -> how long it computes


@dataclass(frozen=True)
class Event:
    """A push as it came in."""

    time: float
    worker: int
    step: int
    staleness: int  # in updates
    version: int  # of the server afterwards


@dataclass
class _Worker:
    given: deque[tuple[Tensor, int]]  # parameters and versions: of the step it computes, and of the next
    computed: int | None = None  # the step whose gradient waits to be pushed
    pushed: int | None = None  # the step after whose push it waits for parameters


class Simulator:
    """Lets `workers` take `steps` steps with one server. Only computing takes time: a push and a pull take none.

    With `ahead` a worker begins its next step while it waits for what its push brings back, as the strategy `async`
    does, and so computes with parameters that are one push older. `max_staleness`: as the strategy's; None: no bound.
    `labels` are those of each worker's share.
    """

    def __init__(
        self,
        server: ParameterServer,
        gradient: Gradient,
        labels: list[int],
        *,
        duration: Duration = lambda worker, step: 1.0,
        max_staleness: int | None = None,
        ahead: bool = False,
    ) -> None:
        self.server = server
        self.gradient = gradient
        self.labels = labels
        self.duration = duration
        self.max_staleness = max_staleness
        self.ahead = ahead
        self.events: list[Event] = []
        self.finished: list[tuple[float, int, int]] = []  # a queue of (time, worker, step) that end

    def run(self, steps: int) -> list[Event]:
        """Every push, in the order in which it came."""
        server = self.server
        server.begin(server.params, range(len(self.labels)), 0)
        first = (server.flat.clone(), server.version)
        self.workers = [_Worker(deque([first] * (1 + self.ahead))) for _ in self.labels]
        for worker in range(len(self.workers)):
            self._start(0.0, worker, 0)
        while self.finished:
            time, worker, step = heapq.heappop(self.finished)
            self.workers[worker].computed = step
            while any([self._advance(time, other, steps) for other in range(len(self.workers))]):
                pass
        return self.events

    def _start(self, time: float, worker: int, step: int) -> None:
        heapq.heappush(self.finished, (time + self.duration(worker, step), worker, step))

    def _push(self, time: float, worker: int, step: int) -> None:
        server = self.server
        held, version = self.workers[worker].given[0]
        gradient = self.gradient(worker, step, held)
        staleness = server.version - version
        server.push(Push(worker, step, version, self.labels[worker], sum(self.labels), gradient))
        self.events.append(Event(time, worker, step, staleness, server.version))

    def _advance(self, time: float, worker: int, steps: int) -> bool:
        """Whether the worker could do something at this time."""
        return self._pull(time, worker, steps) or self._push_and_go_on(time, worker, steps)

    def _push_and_go_on(self, time: float, worker: int, steps: int) -> bool:
        state = self.workers[worker]
        step = state.computed
        if step is None or state.pushed is not None:
            return False
        self._push(time, worker, step)
        state.given.popleft()
        state.computed, state.pushed = None, step
        if self.ahead and step + 1 < steps:
            self._start(time, worker, step + 1)
        return True

    def _pull(self, time: float, worker: int, steps: int) -> bool:
        state, server = self.workers[worker], self.server
        if state.pushed is None:
            return False
        step = state.pushed + 1
        needed = -1 if self.max_staleness is None else step + self.ahead - self.max_staleness
        server.ask(worker, needed, max(0.0, server.rule.squares(state.pushed)) ** 0.5)
        if not server.opens(needed):
            return False
        fresh = torch.empty_like(server.flat)
        server.read(worker, fresh)
        state.given.append((fresh, server.version))
        state.pushed = None
        if step == steps:
            server.leave(worker, parted=True)
        elif not self.ahead:
            self._start(time, worker, step)
        return True
