"""Spans of parts become documents: the texts that are tokenized, one after the other."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from shoal.data import builtin, delimited, encoding, tables
from shoal.data.sources import Part, Span, opened
from shoal.errors import UserError

PIECE_BYTES = 64 * 1024  # a text file is cut into documents of at most this: no file must fit in memory
MIN_PIECE_BYTES, PIECES = 4 * 1024, 16  # a file that is alone, into so many: a short one has some to hold out
BLOCK_BYTES = 1 << 20
LINE_END_BEFORE_TEXT = re.compile(rb"(?<=\S)\n(?=\S)")  # no tokenizer joins text across such a line end


def read_documents(span: Span, text_field: str, skipped: Counter[str] | None = None) -> Iterator[str]:
    """The documents of a span that hold more than white space; raises UserError with file and line.

    `skipped` counts the others: null, empty, white space.
    """
    skipped = Counter() if skipped is None else skipped
    for text in READERS[span.part.format](span, text_field):
        if text and not text.isspace():
            yield text
        else:
            skipped["null" if text is None else "white space" if text else "empty"] += 1


def spans_of(part: Part, span_bytes: int) -> list[Span]:
    """A part cut into spans of about `span_bytes`, where its format can be entered in the middle."""
    if part.size <= span_bytes or part.compressed:
        return [Span(part, part.size)]
    if part.format == "parquet":
        return tables.parquet_spans(part, span_bytes)
    if part.format in ("text", "jsonl"):
        starts = range(0, part.size, span_bytes)
        spans = [Span(part, span_bytes, start, start + span_bytes) for start in starts]
        return [*spans[:-1], Span(part, part.size - starts[-1], starts[-1], None)]
    return [Span(part, part.size)]


def _read_text(span: Span, _: str) -> Iterator[str]:
    """Pieces of a text file, cut at line ends; together they are the file, byte for byte."""
    part = span.part
    most = min(PIECE_BYTES, max(MIN_PIECE_BYTES, part.size // PIECES)) if part.alone else PIECE_BYTES
    with opened(span.part) as file:
        offset, stop = _enter(file, span)
        rest = b""
        while True:
            window = rest + file.read(min(most, stop - offset) - len(rest))
            size = len(window) if len(window) < most else _piece_size(window)
            if not size:
                return
            yield _decoded(window[:size], span.part, offset)
            offset, rest = offset + size, window[size:]


def _piece_size(window: bytes) -> int:
    """Where to cut a full window: after its last line end before text, else a line end, else a character."""
    middle = len(window) // 2
    ends = [found.end() for found in LINE_END_BEFORE_TEXT.finditer(window, middle)]
    if ends:
        return ends[-1]
    if line_end := window.rfind(b"\n") + 1:
        return line_end
    size = len(window)
    while size > len(window) - 3 and window[size - 1] & 0xC0 == 0x80:  # inside a UTF-8 character
        size -= 1
    return size - 1 if window[size - 1] >= 0xC0 else size


def _read_jsonl(span: Span, field: str) -> Iterator[str | None]:
    part = span.part
    with opened(part) as file:
        offset, stop = _enter(file, span)
        for line in file:
            if offset >= stop:
                return
            if not line.isspace():
                yield _text_of_row(line, field, part, offset)
            offset += len(line)


def _text_of_row(line: bytes, field: str, part: Part, offset: int) -> str | None:
    try:
        row = _loaded(_decoded(line, part, offset))
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg} at column {error.colno})"
        raise _bad_line(part, offset, what, "write one JSON object a line (jq -c . FILE does)") from None
    except RecursionError:
        change = "write a row without what is nested"
        raise _bad_line(part, offset, "is nested too deeply to be read", change) from None
    if not isinstance(row, dict):
        change = "write one object a line (jq -c '.[]' FILE does)"
        raise _bad_line(part, offset, "is not a JSON object", change)
    if field not in row:
        fields = tables.shown(list(row)) or "none"
        raise _bad_line(part, offset, f"has no field '{field}'", f"set --text-field to one of: {fields}")
    text = row[field]
    if text is not None and not isinstance(text, str):
        what = f"has a field '{field}' that is {type(text).__name__}, not text"
        raise _bad_line(part, offset, what, "set --text-field to a field of text")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        what = f"has half a character (a lone surrogate) in field '{field}'"
        raise _bad_line(part, offset, what, "write the file again in UTF-8") from None
    return text


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a whole number of more digits than Python reads; no text is one
        return json.loads(text, parse_int=float)


def _decoded(data: bytes, part: Part, offset: int) -> str:
    """UTF-8 to text, without a byte order mark at the front of a file or line; refuses what is not text."""
    try:
        text = encoding.decoded(data, offset)
    except encoding.NotText as error:
        raise _bad_line(part, offset + error.at, error.found, error.change) from None
    return text.removeprefix(encoding.MARK) if offset == 0 or part.format == "jsonl" else text


def _bad_line(part: Part, offset: int, found: str, change: str) -> UserError:
    """An error at a byte of a part; the line is counted only now, when somebody wants to know it."""
    with opened(part) as file:
        line = 1
        while offset > 0 and (block := file.read(min(offset, BLOCK_BYTES))):
            line += block.count(b"\n")
            offset -= len(block)
    return UserError(part.asked, f"{part.name} line {line} {found}", change)


def _enter(file: BinaryIO, span: Span) -> tuple[int, int]:
    """Go to where a span starts; returns that offset and the one where the span ends."""
    start = _line_start(file, span.start) if span.start else 0
    stop = sys.maxsize if span.stop is None else _line_start(file, span.stop)
    if span.start or span.stop is not None:
        file.seek(start)
    return start, stop


def _line_start(file: BinaryIO, offset: int) -> int:
    """The first start of a line at or after `offset` > 0, so that each line belongs to exactly one span."""
    file.seek(offset - 1)
    at = offset - 1
    while block := file.read(BLOCK_BYTES if at > offset else 4096):
        if (end := block.find(b"\n")) >= 0:
            return at + end + 1
        at += len(block)
    return at


READERS: dict[str, Callable[[Span, str], Iterator[str | None]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "topics": lambda span, field: builtin.topics(),
    "csv": delimited.read_rows,
    "tsv": delimited.read_rows,
    "parquet": tables.read_table,
    "arrow": tables.read_table,
}
