"""What a run counts as done."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shoal.checkpoint import Progress
from shoal.data.batches import Batches
from shoal.training.run import Run


class Rows:
    """So many samples without content."""

    def __len__(self) -> int:
        return 50

    def label_counts(self, ids: np.ndarray) -> np.ndarray:
        return np.ones_like(ids)


@pytest.mark.parametrize(("reached", "step", "position"), [(0, 3, 12), (3, 3, 12), (7, 7, 28), (99, 13, 50)])
def test_the_steps_that_only_others_have_taken_are_done_with_their_samples(
    reached: int, step: int, position: int
) -> None:
    """A run that goes on from there repeats none: 13 steps of 4 are all 50 samples."""
    run: Any = SimpleNamespace(
        saver=SimpleNamespace(wait_until_read=lambda: None),
        sync=SimpleNamespace(members=SimpleNamespace(finish=lambda replica: None, reached=reached)),
        replica=None,
        batches=Batches(Rows(), seed=1, global_batch_size=4, micro_batch_size=2, epochs=1),  # type: ignore[arg-type]
        total_steps=13,
        progress=Progress(step=3, position=12),
    )
    Run.leave(run)
    assert (run.progress.step, run.progress.position) == (step, position)
