"""A message is one line, and never loses what it had to say."""

import errno

import pytest

from shoal.errors import LONGEST, ShoalError, UserError, described, foreseen, naming


def raised(function) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\n\n  what it is\nwhere it was"), "RuntimeError: what it is"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_first_text_is_kept(error, said):
    assert described(error) == said


def test_an_error_without_a_text_says_where():
    def fails():
        raise AssertionError

    assert described(raised(fails)).startswith(f"AssertionError in {__file__}:")


def test_what_an_error_came_of_is_told():
    def fails():
        try:
            raise OSError(errno.EIO, "Input/output error", "metrics.jsonl")
        finally:
            raise RuntimeError("Connection closed by peer")

    said = described(raised(fails))
    assert said.startswith("RuntimeError: Connection closed by peer (after OSError: ")
    assert "metrics.jsonl" in said


def test_a_full_disk_is_found_behind_what_followed(tmp_path):
    def fails():
        try:
            with naming(tmp_path):
                raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("Connection closed by peer")

    assert str(foreseen(raised(fails))).startswith(f"{tmp_path}: the disk is full")
    assert str(foreseen(OSError(errno.EDQUOT, "over"), "runs/x")).startswith("runs/x: the disk quota")
    assert foreseen(KeyError("x")) is None
    assert foreseen(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_an_error_is_one_line_whatever_it_quotes():
    said = str(UserError("--data a\nb", "\x1b[31mred\u2028 \udcff", "no\ttab"))
    assert said == r"--data a b: \x1b[31mred \udcff; no\ttab"
    assert len(str(ShoalError("x" * 10**6))) < LONGEST + 10
    assert str(ShoalError("größer als 😀")) == "größer als 😀"
