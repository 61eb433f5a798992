"""All servers as one worker sees them: its gradients go out in ranges, and the parameters come back so."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from shoal.optim.optimizers import NamedParams
from shoal.replica import Step
from shoal.servers.core import END
from shoal.servers.host import NOTHING
from shoal.servers.links import Link
from shoal.servers.messages import PULLS, Kind, Reply, Request
from shoal.servers.ranges import parts
from shoal.servers.update_rules import clip

NAN = float("nan")


class Servers:
    """Asks every server at once, and waits for all. The first one also hears and tells the workers' numbers."""

    def __init__(self, links: list[Link], ranges: list[NamedParams], worker: int) -> None:
        self.links = links
        self.ranges = ranges
        self.worker = worker
        self.versions = [0] * len(links)  # of the parameters in the replica
        self.others = NOTHING  # the sum of what the other workers told last
        self.last = -1  # after so many steps all stop; negative: nobody has asked for it
        self._pulled = self.versions

    @property
    def bytes_sent(self) -> int:
        """Of gradients, to servers in other processes."""
        return sum(link.bytes_sent for link in self.links)

    @torch.no_grad()
    def take(self) -> float:
        """Copy the replica's gradients to where they are sent from; returns their norm."""
        taken = []
        for link, params in zip(self.links, self.ranges, strict=True):
            for p, part in parts(link.gradient, params):
                part.zero_() if p.grad is None else part.copy_(p.grad)
                taken.append(part)
        return get_total_norm(taken).item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Clip the gradients that were taken, which have this norm."""
        for link in self.links:
            clip(link.gradient, norm, max_norm)

    def exchange(
        self, step: Step, needed: int, told: Tensor = NOTHING, *, skip: bool = False
    ) -> Callable[[], Reply]:
        """What pushes the gradients that were taken and pulls, when it is called; as `push` and `pull` at once.

        With `skip` the step is counted, and nothing is pushed. A server that clips must be the only one.
        """
        requests = self._pushes(Kind.SKIP if skip else Kind.EXCHANGE, step, needed, told)
        return lambda: self._ask(requests, told)

    def push(self, step: Step, told: Tensor = NOTHING) -> Reply:
        """Push the gradients that were taken, which were made of the replica's parameters."""
        return self._ask(self._pushes(Kind.PUSH, step, 0, told), told)

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
        for link, params in zip(self.links, self.ranges, strict=True):
            for p, part in parts(link.parameters, params):
                p.copy_(part)

    def state(self) -> dict[str, Tensor]:
        """The state of all optimizers, by parameter and part: with AdamW twice the bytes of the parameters."""
        return {name: tensor for link in self.links for name, tensor in link.state().items()}

    def wait_for_all(self) -> None:
        """Wait until no worker has steps left, and fetch the parameters."""
        self.pull(END)

    def leave(self) -> None:
        """Part from the servers."""
        for link in self.links:
            link.leave()

    def _firsts(self) -> list[bool]:
        return [link is self.links[0] for link in self.links]

    def _pushes(self, kind: Kind, step: Step, needed: int, told: Tensor) -> list[Request]:
        return [
            Request(
                kind, self.worker, step.number, needed, version,
                step.own_labels, step.labels, told.numel() if first else 0,
            )
            for version, first in zip(self.versions, self._firsts(), strict=True)
        ]  # fmt: skip

    def _fetch(self, kind: Kind, needed: int, norm: float) -> Reply:
        return self._ask([Request(kind, self.worker, needed=needed, norm=norm) for _ in self.links])

    def _ask(self, requests: list[Request], told: Tensor = NOTHING) -> Reply:
        """The first server's reply, with the squares of all."""
        for link, request, first in zip(self.links, requests, self._firsts(), strict=True):
            link.ask(request, told if first else NOTHING)
        answers = [link.answer() for link in self.links]
        replies = [reply for reply, _ in answers]
        self.others = answers[0][1]
        self.last = replies[0].last
        if requests[0].kind in PULLS:
            self._pulled = [reply.version for reply in replies]
        known = all(not reply.squares < 0 for reply in replies)
        return replace(replies[0], squares=sum(reply.squares for reply in replies) if known else -1.0)
