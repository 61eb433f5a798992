"""The ranks that train together: the numbers that they exchange, who is present, how they stop and leave."""

import sys
from collections.abc import Callable, Container

import torch
from torch import Tensor

from shoal.replica import Replica
from shoal.wire.wire import Wire


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


class Members:
    """Ranks that all take part in every step, and sum numbers over the wire. Subclasses override what differs."""

    all_agree = True  # whether `agree` returns the same on every rank
    # Whether rank 0 evaluates while the others train: where ranks do not wait for each other, as one may be lost.
    evaluates_alone = False
    reached = 0  # where ranks stop that do not wait for each other: the steps that the foremost has done

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._riders: Callable[[], Tensor] = lambda: torch.empty(0, dtype=torch.float64)
        self._arrived: Callable[[Tensor], object] = lambda sums: None

    @property
    def present(self) -> Container[int]:
        """The ranks that still take part."""
        return range(self.wire.world_size)

    def agree(self, numbers: Tensor) -> Tensor:
        """The sum of the `numbers` [n] of a step over the ranks; where ranks do not wait, of those received so far.

        The last number is positive where this rank wishes to stop. Where ranks do not wait for each other, it comes
        back as whether this rank stops after this step.
        """
        riders = self._riders()
        sums = self._sum(torch.cat([riders.to(numbers), numbers]))
        self._arrived(sums[: len(riders)])
        return sums[len(riders) :]

    @property
    def hears_wish(self) -> bool:
        """Whether this rank already knows that another one wishes to stop."""
        return False

    def carry(self, riders: Callable[[], Tensor], arrived: Callable[[Tensor], object]) -> None:
        """Sum what `riders` returns [k] along with every `agree`, without a message of its own: `arrived` gets it."""
        self._riders, self._arrived = riders, arrived

    def wish(self) -> None:
        """Let the ranks that will not ask know that this one wishes to stop. May run in a signal handler."""
        return

    def finish(self, replica: Replica) -> None:
        """Leave the others, after this rank's last step, which need not be theirs."""
        return

    def _sum(self, numbers: Tensor) -> Tensor:
        return self.wire.sum(numbers)
