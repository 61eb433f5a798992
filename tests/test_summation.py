"""The tree of exact mode: one order of additions, whoever does them."""

import itertools

import pytest
import torch
from torch import Tensor

from shoal.tensors.tree_sum import Node, TreeSum, roots


def tree_of(first: int, size: int, leaves: int) -> str | None:
    """The definition, by recursion: a node halves its range; a half without leaves adds nothing."""
    if first >= leaves:
        return None
    if size == 1:
        return str(first)
    left, right = tree_of(first, size // 2, leaves), tree_of(first + size // 2, size // 2, leaves)
    return left if right is None else f"({left}+{right})"


class Written:
    """Stands in for a tensor, and writes down the additions."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add_(self, other: "Written") -> "Written":
        self.text = f"({self.text}+{other.text})"
        return self

    def clone(self) -> "Written":
        return Written(self.text)


def held_by(first: int, last: int) -> TreeSum:
    tree = TreeSum()
    for leaf in range(first, last):
        tree.add(leaf, Written(str(leaf)))  # type: ignore[arg-type]
    return tree


@pytest.mark.parametrize("leaves", range(1, 34))
def test_one_rank_adds_in_the_order_of_the_tree(leaves: int) -> None:
    assert held_by(0, leaves).finish().text == tree_of(0, 64, leaves)  # type: ignore[attr-defined]


@pytest.mark.parametrize("leaves", range(1, 12))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_cut_into_shares_ends_in_the_same_order(leaves: int, ranks: int) -> None:
    for cuts in itertools.combinations(range(1, leaves), ranks - 1):
        ends = [0, *cuts, leaves]
        whole = TreeSum()
        for first, last in itertools.pairwise(ends):
            own = held_by(first, last).pending
            assert [node for node, _ in own] == roots(first, last)
            for node, tensor in own:
                whole.push(node, tensor, owned=True)
        assert whole.finish().text == tree_of(0, 16, leaves)  # type: ignore[attr-defined]


@pytest.mark.parametrize("last", [1, 2, 3, 7, 8, 13, 64, 100])
def test_roots_are_the_largest_subtrees_of_a_share(last: int) -> None:
    for first in range(last):
        nodes: list[Node] = roots(first, last)
        assert [leaf for start, stop in nodes for leaf in range(start, stop)] == list(range(first, last))
        for start, stop in nodes:
            size = stop - start
            assert size & (size - 1) == 0
            assert start % size == 0
            parent = start - start % (2 * size)
            assert not (first <= parent and parent + 2 * size <= last), "its parent is inside as well"


def test_what_is_added_is_copied_and_at_most_log_many_are_held() -> None:
    tree, buffer = TreeSum(), torch.zeros(3)
    for leaf in range(100):
        tree.add(leaf, buffer.fill_(leaf))
        assert len(tree.pending) <= 7
    assert torch.equal(tree.finish(), torch.full((3,), 4950.0))
    assert torch.equal(buffer, torch.full((3,), 99.0))


def test_the_order_decides_on_bits() -> None:
    """Why there is a tree: float32 sums in another order differ."""
    values: list[Tensor] = list(torch.randn(64, 100, generator=torch.Generator().manual_seed(0)))
    tree = TreeSum()
    for leaf, value in enumerate(values):
        tree.add(leaf, value)
    assert not torch.equal(tree.finish(), sum(values, torch.zeros(100)))
