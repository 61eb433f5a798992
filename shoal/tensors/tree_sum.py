"""Exact mode: sums over the micro-batches of a step in the order of one fixed binary tree.

The tree of V leaves halves the range [0, 2**k) that holds them; a node without leaves adds nothing. A rank that
holds the leaves [first, last) can sum some nodes alone: the largest ones that lie wholly inside its range. These
are its *roots*. Whoever has all roots can finish the tree. The order of every addition is thus a function of V
alone, and so are the bits of the result: neither the number of ranks nor their shares enter.
"""

from torch import Tensor

Node = tuple[int, int]  # the leaves [start, stop) below it; stop - start is a power of two


def roots(first: int, last: int) -> list[Node]:
    """The largest nodes of the tree whose leaves all lie in [first, last), from left to right."""
    nodes = []
    while first < last:
        size = first & -first or 1 << last.bit_length()  # the largest node that starts here
        while first + size > last:
            size //= 2
        nodes.append((first, first + size))
        first += size
    return nodes


class TreeSum:
    """Sums tensors that arrive one leaf after the other, holding at most log2 of them."""

    def __init__(self) -> None:
        self.pending: list[tuple[Node, Tensor]] = []

    def add(self, leaf: int, tensor: Tensor) -> None:
        """Add the tensor of `leaf`; it is copied where it must be kept. Leaves come in rising order."""
        self.push((leaf, leaf + 1), tensor, owned=False)

    def push(self, node: Node, tensor: Tensor, *, owned: bool) -> None:
        """Add the sum of a whole `node`, and merge it with its left sibling as long as that is complete."""
        while self.pending and _siblings(self.pending[-1][0], node):
            (start, _), left = self.pending.pop()
            tensor, node, owned = left.add_(tensor), (start, node[1]), True
        self.pending.append((node, tensor if owned else tensor.clone()))

    def finish(self) -> Tensor:
        """The sum of all: the nodes that are left lack right siblings, so they fold from the right."""
        _, total = self.pending.pop()
        while self.pending:
            _, left = self.pending.pop()
            total = left.add_(total)
        return total


def _siblings(left: Node, right: Node) -> bool:
    size = left[1] - left[0]
    return right[1] - right[0] == size and left[1] == right[0] and left[0] % (2 * size) == 0
