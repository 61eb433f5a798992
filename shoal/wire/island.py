"""The ranks that hold one replica together, and so do everything in step with each other."""

from collections.abc import Callable

from torch import Tensor

from shoal.wire.mesh import Mesh


class Island:
    """Neighbouring ranks, `ranks` among all; one rank alone where each holds a whole replica.

    They are `teams`, which share the micro-batches of a step with those of the other islands.
    """

    def __init__(self, mesh: Mesh) -> None:
        size = mesh.size("island")
        first = mesh.rank - mesh.rank % size
        self.ranks = range(first, first + size)
        self.is_first = mesh.rank == first
        self.teams = range(first // mesh.size("team"), (first + size) // mesh.size("team"))
        self.team = mesh.team
        self._rank = mesh.rank
        self._wire = mesh.wire("island") if size > 1 else None

    @property
    def rank(self) -> int:
        """Which of them this one is: ranks with the same number hold the same pieces of their replicas."""
        return self._rank - self.ranks.start

    def __len__(self) -> int:
        return len(self.ranks)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the island, in place."""
        return self._wire.sum(numbers) if self._wire else numbers

    def norm(self, own: Tensor) -> Tensor:
        """The norm of what the ranks hold together, each its `own` part of it."""
        return self.sum(own.square()).sqrt() if self._wire else own

    def agree(self, with_others: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
        """The sum of `numbers` over this island, then `with_others` of it: the first rank's result, on each rank."""
        found = with_others(self.sum(numbers))
        return self.sum(found if self.is_first else found.zero_()) if self._wire else found
