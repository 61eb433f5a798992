"""Workers and servers in one process, in a time that a script makes: what happens is the same in every run."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.sync.parameter_server.core import ParameterServer, Push

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
    given: deque[
        tuple[Tensor, int]
    ]  # parameters and their versions: of the step it computes, and of the next
    waits_for: int | None = None  # the step that it may not compute yet


class Simulator:
    """Lets `workers` take `steps` steps with one server. Only computing takes time: a push and a pull take none.

    With `ahead` the parameters of step c + 1 are pulled when step c begins, as the strategy `async` does, else when
    it ends. `max_staleness`: as the strategy's; None: no bound. `labels` are those of each worker's share.
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
            self._push(time, worker, step)
            self.workers[worker].waits_for = step + 1
            for other in range(len(self.workers)):
                self._go_on(time, other, steps)
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

    def _go_on(self, time: float, worker: int, steps: int) -> None:
        """Let the worker begin its next step, if it waits for one and may."""
        state = self.workers[worker]
        step = state.waits_for
        if step is None:
            return
        needed = -1 if self.max_staleness is None else step + self.ahead - self.max_staleness
        norm = max(0.0, self.server.policy.squares(self.server)) ** 0.5
        self.server.ask(worker, needed, norm)
        if not self.server.opens(needed):
            return
        fresh = torch.empty_like(self.server.flat)
        self.server.read(worker, fresh)
        state.given.append((fresh, self.server.version))
        state.given.popleft()
        state.waits_for = None
        if step < steps:
            self._start(time, worker, step)
        else:
            self.server.leave(worker, parted=True)
