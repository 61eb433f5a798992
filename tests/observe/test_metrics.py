"""Metrics are written or the run ends; pictures of them are drawn as long as that works."""

import errno
import io
from pathlib import Path

import pytest

from shoal.observe.console import Screen
from shoal.observe.trackers import MetricsFile, TensorBoard


def test_a_tracker_that_fails_is_told_once_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file, and no folder")
    told: list[str] = []
    board = TensorBoard(tmp_path / "tb", "id", told.append)
    for step in range(3):
        board.write({"step": step, "train/loss": 1.0})
    board.close()
    assert len(told) == 1
    assert "TensorBoard" in told[0]


class FullDisk(io.StringIO):
    """A file that nothing more fits into."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_names_the_file(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics._file.close()
    metrics._file = FullDisk()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        metrics.write({"step": 1})


def test_what_is_shown_stands_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(speaks=True).say("runs/:smile:/[bold]x[/bold] [/]")
    assert capsys.readouterr().out == "runs/:smile:/[bold]x[/bold] [/]\n"
