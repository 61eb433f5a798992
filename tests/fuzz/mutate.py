"""Damage by a seed: to values, words, text and bytes."""

from collections.abc import Callable
from random import Random
from typing import Any

ODD = [
    "", " ", "0", "-1", "1", "3", "7", "0.5", "-0.0", "1e-3", "1e400", "nan", "-inf", "9" * 5000,
    "0x10", "012", "1:30", "true", "no", "null", "~", "~nobody/x", "[]", "[1, [2]]", "{}",
    "{a: {b: 1}}", "&a [*a]", "!!python/name:os.system", "auto", "none", "latest", ".", "..", "/",
    "/dev/null", "nowhere", "a,b", ",", "2,1", "10k", "5ktokens", "end", "--", "-", "--seed", "=", "é",
    "鱼", "🐟", "\u202e", "[bold]", ":smile:", "%s", "$HOME", "a\nb", "a\tb", "\x1b[31m", "x" * 300,
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"\xed\xa0\x80",
    b"\x1f\x8b",
    b"PK\3\4",
    b",",
]


Change = Callable[
    [Random, Any, int, int], object
]  # of a list of words or lines, or of bytes, between two places


def words(random: Random, given: list[str]) -> list[str]:
    """A command line with one to three words left out, repeated, misspelt, or replaced by odd ones."""
    changed = _changed(
        random, list(given), [_leave_out, _repeat, _put_odd, _replace_by_odd, _misspell], most=3
    )
    return [word.replace("\0", "") for word in changed]


def lines(random: Random, text: str) -> str:
    """Lines of keys and values, one to three of them changed."""
    ways = [_leave_out, _repeat, _give_odd_value, _give_odd_value, _give_odd_value, _indent, _misspell]
    return "\n".join(_changed(random, text.splitlines(), ways, most=3)) + "\n"


def content(random: Random, given: bytes) -> bytes:
    """Bytes with one to four places cut out, repeated, overwritten or filled, or without their end."""
    ways = [_leave_out, _repeat, _overwrite, _fill, _cut_short]
    return bytes(_changed(random, bytearray(given), ways, most=4))


def _changed(random: Random, given: Any, ways: list[Change], most: int) -> Any:
    for _ in range(random.randint(1, most)):
        begin = random.randrange(len(given) + 1)
        length = 1 if isinstance(given, list) else int(2 ** random.uniform(0, 10))
        random.choice(ways)(random, given, begin, min(len(given), begin + length))
    return given


def _leave_out(random: Random, given: Any, begin: int, end: int) -> None:
    del given[begin:end]


def _repeat(random: Random, given: Any, begin: int, end: int) -> None:
    at = random.randrange(len(given) + 1)
    given[at:at] = given[begin:end]


def _put_odd(random: Random, given: list[str], begin: int, end: int) -> None:
    given.insert(begin, random.choice(ODD))


def _replace_by_odd(random: Random, given: list[str], begin: int, end: int) -> None:
    given[begin:end] = [random.choice(ODD)]


def _give_odd_value(random: Random, given: list[str], begin: int, end: int) -> None:
    given[begin:end] = [f"{line.partition(': ')[0]}: {random.choice(ODD)}" for line in given[begin:end]]


def _indent(random: Random, given: list[str], begin: int, end: int) -> None:
    given[begin:end] = [" " * random.randint(0, 5) + line.strip() for line in given[begin:end]]


def _misspell(random: Random, given: list[str], begin: int, end: int) -> None:
    for number in range(begin, end):
        word = given[number]
        at = random.randrange(len(word) + 1)
        given[number] = word[:at] + random.choice("-_=: x") + word[at + random.randint(0, 1) :]


def _overwrite(random: Random, given: bytearray, begin: int, end: int) -> None:
    given[begin:end] = random.randbytes(end - begin)


def _fill(random: Random, given: bytearray, begin: int, end: int) -> None:
    given[begin:begin] = random.choice(BYTES) * random.choice([1, 3, 2000])


def _cut_short(random: Random, given: bytearray, begin: int, end: int) -> None:
    if random.random() < 0.3:
        del given[begin:]
