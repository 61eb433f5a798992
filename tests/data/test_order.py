"""The order of samples: a permutation for every size, that needs nothing but the position."""

import numpy as np
import pytest

from shoal.data.order import derive_seed, permute

SIZES = [
    1,
    2,
    3,
    4,
    5,
    15,
    16,
    17,
    63,
    64,
    65,
    100,
    255,
    256,
    257,
    1000,
    1023,
    1025,
    4097,
    65536,
    65537,
    100003,
]


def whole(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size, dtype=np.int64), size, key)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**63 - 1])
def test_every_place_is_taken_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [7, 1000, 4097])
def test_a_position_goes_to_its_place_whoever_is_asked_with_it(size: int) -> None:
    places = whole(size, 9)
    chosen = np.random.default_rng(0).permutation(size)[: size // 2]
    assert np.array_equal(permute(chosen, size, 9), places[chosen])
    assert all(permute(np.array([p]), size, 9)[0] == places[p] for p in chosen[:20])


def test_sizes_that_no_memory_holds() -> None:
    """Distinct positions stay distinct and inside, at sizes where the whole permutation cannot be looked at."""
    for size in (2**31 - 1, 2**40 + 1, 2**50):
        positions = np.unique(np.random.default_rng(1).integers(0, size, 10_000))
        places = permute(positions, size, 3)
        assert len(np.unique(places)) == len(positions)
        assert places.min() >= 0
        assert places.max() < size


def test_keys_give_orders_of_their_own() -> None:
    """Fixed points of two orders against each other: one is expected of a random pair, whatever the size."""
    orders = [whole(1000, key) for key in range(20)]
    meetings = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert 0.5 < np.mean(meetings) < 1.5
    assert max(meetings) < 10


def test_neighbours_are_torn_apart() -> None:
    steps = np.abs(np.diff(whole(10_000, 4)))
    assert abs(steps.mean() - 10_000 / 3) < 200  # of a random order: a third of the size
    assert (steps == 1).sum() < 20


def test_seeds_of_different_purposes_are_different() -> None:
    purposes = [
        (),
        ("epoch", 0),
        ("epoch", 1),
        ("dropout", 0, 1),
        ("dropout", 1, 0),
        ("dropout", 0, 11),
        ("1",),
        (1,),
    ]
    seeds = {derive_seed(seed, *purpose) for purpose in purposes for seed in range(50)}
    assert len(seeds) == 50 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_order_of_a_seed_never_changes() -> None:
    """A run that is resumed under a later version must find its samples where they were."""
    assert whole(10, 1).tolist() == [3, 1, 0, 7, 9, 4, 8, 6, 5, 2]
    assert derive_seed(42, "dropout", 7, 3) == 1054830824458359207
