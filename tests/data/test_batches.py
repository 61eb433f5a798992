"""The batches of a run: each sample once an epoch, and each step a function of its number."""

import numpy as np
import pytest
from laws.rows import IGNORED, Rows

from shoal.data.batches import ABSENT, Batches

COUNTS = [(1, 4), (3, 4), (4, 4), (7, 4), (13, 6), (61, 12), (97, 10)]  # samples, global batch size


def batches(size: int, batch: int, *, seed: int = 1, micro: int = 2, epochs: float | None = None) -> Batches:
    return Batches(Rows(size, 5), seed=seed, global_batch_size=batch, micro_batch_size=micro, epochs=epochs)


@pytest.mark.parametrize(("size", "batch"), COUNTS)
def test_each_epoch_uses_each_sample_once(size: int, batch: int) -> None:
    epochs = 3
    made = batches(size, batch, epochs=epochs)
    used = np.concatenate([made.at(step).ids.reshape(-1) for step in range(made.steps)])
    assert len(used) == batch * -(-size * epochs // batch)
    present = used[used != ABSENT]
    assert np.array_equal(used[: len(present)], present), "absent rows stand at the very end"
    for epoch in present.reshape(epochs, size):
        assert np.array_equal(np.sort(epoch), np.arange(size))


@pytest.mark.parametrize(("epochs", "used"), [(0.5, 30), (1.0, 61), (1.25, 76), (2.0, 122)])
def test_a_part_of_an_epoch_ends_where_it_says(epochs: float, used: int) -> None:
    made = batches(61, 12, epochs=epochs)
    ids = np.concatenate([made.at(step).ids.reshape(-1) for step in range(made.steps)])
    assert (ids != ABSENT).sum() == used
    assert (made.at(made.steps).ids == ABSENT).all()
    assert made.at(made.steps).labels == 0


def test_epochs_are_shuffled_apart_and_by_the_seed() -> None:
    first, second = np.split(
        np.concatenate([batches(60, 12).at(step).ids.reshape(-1) for step in range(10)]), 2
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(batches(60, 12, seed=2).at(0).ids, batches(60, 12).at(0).ids)


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    forward = [batches(61, 12, epochs=4).at(step) for step in range(20)]
    made = batches(61, 12, epochs=4)
    for step in np.random.default_rng(0).permutation(20):
        again = made.at(int(step))
        assert np.array_equal(again.ids, forward[step].ids)
        assert again.labels == forward[step].labels


Attempts = list[tuple[int, int]]  # global batch size, steps

ATTEMPTS: list[Attempts] = [
    [(8, 5), (16, 99)],
    [(16, 5), (4, 99)],
    [(8, 3), (12, 2), (2, 7), (60, 99)],
    [(4, 0), (6, 99)],
    [(8, 99), (16, 99)],
]


def follow(attempts: Attempts, size: int, epochs: float | None, seed: int = 1) -> tuple[np.ndarray, int]:
    """The ids that are used when each attempt goes on where the one before stopped, and the steps in all."""
    step, position, used = 0, 0, []
    for batch, steps in attempts:
        made = Batches(
            Rows(size, 5),
            seed=seed,
            global_batch_size=batch,
            micro_batch_size=2,
            epochs=epochs,
            at=(step, position),
        )
        for taken in map(made.at, range(step, min(step + steps, made.steps or step + steps))):
            assert taken.position == position
            used.append(taken.ids.reshape(-1))
            position, step = taken.next_position, taken.step + 1
    ids = np.concatenate(used)
    return ids[ids != ABSENT], step


@pytest.mark.parametrize("epochs", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("attempts", ATTEMPTS)
def test_another_batch_goes_on_exactly(attempts: Attempts, epochs: float) -> None:
    """Each sample once an epoch, in the same order, to the same end, in as many steps as that takes."""
    used, steps = follow(attempts, 61, epochs)
    whole, _ = follow([(10, 99)], 61, epochs)
    assert np.array_equal(used, whole)
    position, expected = 0, 0
    for batch, asked in attempts:
        left = len(whole) - position
        expected += min(asked, -(-left // batch))
        position = min(len(whole), position + asked * batch)
    assert steps == expected


def test_more_epochs_go_on_where_the_data_ended() -> None:
    """The rows of the last step that were absent are no samples."""
    first = batches(61, 12, epochs=1)
    last = first.at(first.steps - 1)
    longer = Batches(
        Rows(61, 5), seed=1, global_batch_size=12, micro_batch_size=2, epochs=2, at=(6, last.next_position)
    )
    assert last.next_position == 61
    used = np.concatenate([longer.at(step).ids.reshape(-1) for step in range(6, longer.steps)])
    assert np.array_equal(np.sort(used[used != ABSENT]), np.arange(61))


def test_the_bound_does_not_move_the_order() -> None:
    """A run by steps and one by epochs take the same samples, as far as both go."""
    by_steps, by_epochs = batches(60, 12), batches(60, 12, epochs=2)
    assert all(np.array_equal(by_steps.at(s).ids, by_epochs.at(s).ids) for s in range(10))
    assert by_steps.steps is None
    assert (by_steps.at(10_000).ids != ABSENT).all()


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_micro_batches_only_cut_the_same_rows(micro: int) -> None:
    whole, cut = batches(61, 12, micro=12).at(3), batches(61, 12, micro=micro).at(3)
    assert cut.ids.shape == (12 // micro, micro)
    assert np.array_equal(cut.ids.reshape(-1), whole.ids.reshape(-1))
    assert cut.labels == whole.labels


@pytest.mark.parametrize("epochs", [None, 1.0, 2.5])
def test_labels_are_those_of_the_collated_micro_batches(epochs: float | None) -> None:
    made = batches(61, 12, epochs=epochs)
    for step in range(made.steps or 12):
        batch = made.at(step)
        collated = [batch.micro_batch(v) for v in range(len(batch.ids))]
        assert batch.labels == sum(int((c["labels"] != IGNORED).sum()) for c in collated)
