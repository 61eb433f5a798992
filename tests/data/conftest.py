"""The corpus that most tests of the data prepare."""

from pathlib import Path

import pytest
from corpora import some_text


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of twenty text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(some_text(number, 200))
    return folder
