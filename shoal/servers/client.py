"""All servers as one worker sees them: gradients are sent, and parameters come back, in one range a server."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from shoal.optim.optimizers import NamedParams
from shoal.replica import Step
from shoal.servers.core import END
from shoal.servers.host import NOTHING
from shoal.servers.messages import PULLS, Kind, Reply, Request
from shoal.servers.ranges import parts
from shoal.servers.stubs import ServerStub
from shoal.servers.update_rules import clip

NAN = float("nan")


class ServerClient:
    """Asks every server at once, and waits for all. Only the first one passes on the workers' numbers."""

    def __init__(self, stubs: list[ServerStub], ranges: list[NamedParams], worker: int) -> None:
        self.stubs = stubs
        self.ranges = ranges
        self.worker = worker
        self.versions = [0] * len(stubs)  # of the parameters in the replica
        self.others = NOTHING  # the sum of the numbers that the other workers sent last
        self.last = -1  # the number of steps after which all stop; negative: nobody has asked for it
        self._pulled = self.versions

    @property
    def bytes_sent(self) -> int:
        """Of gradients, to servers in other processes."""
        return sum(stub.bytes_sent for stub in self.stubs)

    @torch.no_grad()
    def copy_gradients(self) -> float:
        """Copy the replica's gradients into the send buffers; returns their norm."""
        copied = []
        for stub, params in zip(self.stubs, self.ranges, strict=True):
            for p, part in parts(stub.gradient, params):
                part.zero_() if p.grad is None else part.copy_(p.grad)
                copied.append(part)
        return get_total_norm(copied).item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Clip the gradients in the send buffers, which have this norm."""
        for stub in self.stubs:
            clip(stub.gradient, norm, max_norm)

    def exchange(
        self, step: Step, needed: int, numbers: Tensor = NOTHING, *, skip: bool = False
    ) -> Callable[[], Reply]:
        """A function that pushes the gradients in the send buffers and pulls, in one message each way.

        With `skip` the step is counted, and nothing is pushed. A server that clips must be the only one.
        """
        requests = self._pushes(Kind.SKIP if skip else Kind.EXCHANGE, step, needed, numbers)
        return lambda: self._ask(requests, numbers)

    def push(self, step: Step, numbers: Tensor = NOTHING) -> Reply:
        """Push the gradients in the send buffers, which were computed at the replica's parameters."""
        return self._ask(self._pushes(Kind.PUSH, step, 0, numbers), numbers)

    def pull(self, needed: int, norm: float = NAN) -> Reply:
        """Fetch the parameters, once they contain every worker's steps before `needed`."""
        return self._fetch(Kind.PULL, needed, norm)

    def peek(self) -> Reply:
        """Fetch the parameters as they are."""
        return self._fetch(Kind.PEEK, 0, NAN)

    @torch.no_grad()
    def load(self) -> None:
        """Copy the parameters that were fetched last into the replica."""
        self.versions = self._pulled
        for stub, params in zip(self.stubs, self.ranges, strict=True):
            for p, part in parts(stub.parameters, params):
                p.copy_(part)

    def state(self) -> dict[str, Tensor]:
        """The state of all optimizers, by parameter and part: with AdamW twice the bytes of the parameters."""
        return {name: tensor for stub in self.stubs for name, tensor in stub.state().items()}

    def wait_for_all(self) -> None:
        """Wait until no worker has steps left, and fetch the parameters."""
        self.pull(END)

    def leave(self) -> None:
        """Leave the servers."""
        for stub in self.stubs:
            stub.leave()

    def _firsts(self) -> list[bool]:
        return [stub is self.stubs[0] for stub in self.stubs]

    def _pushes(self, kind: Kind, step: Step, needed: int, numbers: Tensor) -> list[Request]:
        return [
            Request(
                kind, self.worker, step.number, needed, version,
                step.own_labels, step.labels, numbers.numel() if first else 0,
            )
            for version, first in zip(self.versions, self._firsts(), strict=True)
        ]  # fmt: skip

    def _fetch(self, kind: Kind, needed: int, norm: float) -> Reply:
        return self._ask([Request(kind, self.worker, needed=needed, norm=norm) for _ in self.stubs])

    def _ask(self, requests: list[Request], numbers: Tensor = NOTHING) -> Reply:
        """The first server's reply, with the squares of all."""
        for stub, request, first in zip(self.stubs, requests, self._firsts(), strict=True):
            stub.ask(request, numbers if first else NOTHING)
        answers = [stub.answer() for stub in self.stubs]
        replies = [reply for reply, _ in answers]
        self.others = answers[0][1]
        self.last = replies[0].last
        if requests[0].kind in PULLS:
            self._pulled = [reply.version for reply in replies]
        known = all(not reply.squares < 0 for reply in replies)
        return replace(replies[0], squares=sum(reply.squares for reply in replies) if known else -1.0)
