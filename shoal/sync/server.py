"""A parameter server, synchronous: every step the servers merge all gradients, update, and send the parameters.

With the mean and all workers it equals all-reduce to rounding, at up to N/2 times its bytes on a rank with a server.
Use it where a worker may be slow or lost (`--quorum`) or wrong (`--aggregation median`). Li et al. 2014, "Scaling
Distributed Machine Learning with the Parameter Server"; the rules of `--quorum` and `--aggregation` have their
sources in `servers.update_rules` and `servers.merge`.
"""

import math

import torch

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.errors import UserError
from shoal.replica import Replica, Step
from shoal.servers.core import norm_of
from shoal.servers.merge import Merge, mean, median, trimmed_mean
from shoal.servers.update_rules import Rounds
from shoal.sync.base import State
from shoal.sync.server_strategy import ServerStrategy, Traffic
from shoal.wire.wire import Wire


def cost(config: RunConfig, sizes: Sizes) -> Cost:
    """Of the rank that sends most: one with a server."""
    return Traffic.of(config, sizes).most(sizes.world_size)


class Server(ServerStrategy):
    """One round a step. A worker that is late for a round that a quorum has closed skips the steps that are over."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        quorum = config.strategy.quorum
        super().__init__(config, wire, wait=quorum is None, alone=quorum is not None)
        if quorum is not None and quorum > wire.world_size:
            found = f"there are {wire.world_size} workers"
            raise UserError(f"--quorum {quorum}", found, f"take at most {wire.world_size}")
        self.round = 0  # the first step that is not over
        self.late = 0

    def update_rule(self, replica: Replica) -> Rounds:
        options = self.options
        merges: dict[str, Merge] = {
            "mean": mean, "median": median, "trimmed-mean": trimmed_mean(options.trim),
        }  # fmt: skip
        return Rounds(
            merges[options.aggregation],
            replica.schedule,
            quorum=options.quorum,
            max_norm=replica.max_grad_norm,
        )

    def exchange(self, replica: Replica, step: Step) -> None:
        number, numbers = step.number, self.members.numbers
        if number >= self.round:
            self.servers.copy_gradients()
            if len(self.servers.stubs) == 1 and replica.is_whole:
                reply = self.servers.exchange(step, number + 1, numbers)()
                norm = norm_of(reply.squares)
            else:  # the norm to clip by is that over all servers
                own = norm_of(self.servers.push(step, numbers).squares)
                norm = replica.norm(torch.tensor(own, dtype=torch.float64)).item()
                reply = self.servers.pull(number + 1, norm)
            self.round = reply.clock
            self.encoder.commit()
            self.servers.load()
            self._note(replica, step, norm)
            if self.host is not None and self.options.quorum is None:  # all wait for the last one anyway
                self.host.serve_all(number + 1)
        self._catch_up(replica, number + 1)

    def state_dict(self) -> State:
        # With a quorum a checkpoint does not wait for other workers, so it cannot hold what their codecs left out.
        return super().state_dict() if self.options.quorum is None else {}

    def metrics(self) -> dict[str, float]:
        return {"sync/late_steps": self.late} if self.options.quorum is not None else {}

    def _note(self, replica: Replica, step: Step, norm: float) -> None:
        if math.isnan(norm):
            self.late += 1
            return
        replica.judge(step, norm)

    def _catch_up(self, replica: Replica, step: int) -> None:
        """Skip the computation of steps that are over."""
        if step < self.round:
            replica.pause()
        else:
            replica.resume()
