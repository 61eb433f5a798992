"""A parameter server, synchronous: every step the servers merge all gradients, update, and hand out the parameters.

With the mean and all workers it is all-reduce to rounding, at up to N/2 times its bytes where a server is; take it
where a worker may be slow or gone (`--quorum`) or wrong (`--aggregation median`). Li et al. 2014, "Scaling
Distributed Machine Learning with the Parameter Server"; the rules of `--quorum` and `--aggregation` have their
sources in `servers.update_rules` and `servers.merge`.
"""

import math

import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.cost import Cost, Sizes
from shoal.errors import UserError
from shoal.replica import Replica, Step
from shoal.servers.core import norm_of
from shoal.servers.host import NOTHING
from shoal.servers.merge import Merge, mean, median, trimmed_mean
from shoal.servers.update_rules import Rounds
from shoal.sync.base import State
from shoal.sync.central import Central, Traffic
from shoal.wire.wire import Wire


class Server(Central):
    """A round a step. Who comes late to a round that a quorum has closed leaves out the steps that are over."""

    def __init__(self, config: RunConfig, wire: Wire) -> None:
        super().__init__(config, wire)
        self.all_agree = self.options.quorum is None
        quorum = config.strategy.quorum
        if quorum is not None and quorum > wire.world_size:
            found = f"there are {wire.world_size} workers"
            raise UserError(f"--quorum {quorum}", found, f"take at most {wire.world_size}")
        self.round = 0  # before which no step is taken any more
        self.late = 0
        self.told = NOTHING

    def policy(self, replica: Replica) -> Rounds:
        """Rounds; clipped, as everywhere, by the norm of the merged gradient."""
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

    def turn(self, replica: Replica, step: Step) -> None:
        """Push, hear of the norm, and pull what has become of it."""
        number = step.number
        if number >= self.round:
            self.servers.take()
            if len(self.servers.links) == len(replica.island) == 1:
                reply = self.servers.exchange(step, number + 1, self.told)()
                norm = norm_of(reply.squares)
            else:  # the norm to clip by is that over all servers
                own = norm_of(self.servers.push(step, self.told).squares)
                norm = replica.island.norm(torch.tensor(own, dtype=torch.float64)).item()
                reply = self.servers.pull(number + 1, norm)
            self.round = reply.clock
            self.servers.load()
            self._note(replica, step, norm)
            if self.host is not None and self.options.quorum is None:  # all wait for the last one anyway
                self.host.serve_all(number + 1)
        self._catch_up(replica, number + 1)

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks; with a quorum, what the others told with their last pushes."""
        if self.options.quorum is None:
            return self.wire.sum(numbers)
        self.told = numbers.clone()
        return self.decided(numbers + self.servers.others if self.servers.others.numel() else numbers)

    def state_dict(self) -> State:
        """What the codec left out; nothing with a quorum, where a checkpoint does not wait for other workers."""
        return super().state_dict() if self.options.quorum is None else {}

    @property
    def evaluates_alone(self) -> bool:
        """Where nobody waits for a worker that may be gone."""
        return self.options.quorum is not None

    def metrics(self) -> dict[str, float]:
        """How many of this rank's steps came too late."""
        return {"sync/late_steps": self.late} if self.options.quorum is not None else {}

    @classmethod
    def cost(cls, config: RunConfig, sizes: Sizes) -> Cost:
        """Of the rank that sends most: one with a server."""
        return Traffic.of(config, sizes).most(sizes.world_size)

    def _note(self, replica: Replica, step: Step, norm: float) -> None:
        if math.isnan(norm):
            self.late += 1
            return
        replica.judge(step, norm)

    def _catch_up(self, replica: Replica, step: int) -> None:
        """Compute nothing for steps that are over."""
        if step < self.round:
            replica.pause()
        else:
            replica.resume()
