"""Workers of parameter servers, which need not wait for each other, and how all of them stop at one step."""

from collections.abc import Callable

from torch import Tensor

from shoal.replica import Replica
from shoal.servers.client import ServerClient
from shoal.servers.host import NOTHING, Host
from shoal.sync.members import Members, say
from shoal.wire.pairs import Bell
from shoal.wire.wire import Wire

CATCH_UP = 4  # the most steps that a worker takes, once all stop, to reach the foremost


class ServerMembers(Members):
    """Where workers `wait` for each other, numbers are summed as usual; else each push carries the worker's numbers.

    Then `agree` returns the own numbers and those that the others sent last. `finish` leaves the servers.
    """

    def __init__(self, wire: Wire, finish: Callable[[Replica], None], *, wait: bool, alone: bool) -> None:
        super().__init__(wire)
        self.all_agree = wait
        self.evaluates_alone = alone
        self.numbers = NOTHING  # that the next push carries
        self._finish = finish
        self._done = 0  # steps, by this worker
        self._steps_since = 0  # this worker knows that all stop

    def connect(self, client: ServerClient, host: Host | None, bell: Bell) -> None:
        """The servers, the one of this process, and the bell of rank 0's."""
        self._client, self._host, self._bell = client, host, bell

    def count(self, done: int) -> None:
        """This worker has done so many steps."""
        self._done = done

    def wish(self) -> None:
        # Rank 0's server tells all workers with its next replies after which step they stop.
        self._bell.ring()

    @property
    def hears_wish(self) -> bool:
        return self._host is not None and self._host.last >= 0

    def finish(self, replica: Replica) -> None:
        self._finish(replica)

    def _sum(self, numbers: Tensor) -> Tensor:
        if self.all_agree:
            return super()._sum(numbers)
        self.numbers, others = numbers.clone(), self._client.others
        return self._decide(numbers + others if others.numel() == numbers.numel() else numbers)

    def _decide(self, numbers: Tensor) -> Tensor:
        """Replace the last number, a wish to stop, by whether this worker stops here.

        All stop after the same step, beyond which none has pushed, so that a run that continues from there uses no
        sample twice. A worker far behind does not reach that step: its share of the steps between is left out.
        """
        if self.wire.world_size == 1:
            return numbers
        if numbers[-1] > 0:
            self.wish()
        last = self._client.last
        self._steps_since += last >= 0
        behind = max(0, last - self._done)
        stops = self._steps_since > 0 and (not behind or self._steps_since > CATCH_UP)
        if stops and behind:
            say(f"shoal: worker {self.wire.rank} stops {behind} steps behind: its share of them is left out")
        self.reached = last if stops else 0
        numbers[-1] = stops
        return numbers
