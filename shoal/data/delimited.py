"""CSV and TSV files become documents: the column `text_field`, streamed, every quote accounted for."""

import csv
import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from shoal.data import encoding
from shoal.data.sources import Part, Span, opened
from shoal.data.tables import no_column
from shoal.errors import UserError

DELIMITERS = {"csv": ",;\t", "tsv": "\t,;"}  # the first under which the header has the column
LONGEST_FIELD = 64 << 20  # characters; a quote that never closes must not read the whole file


def read_rows(span: Span, field: str) -> Iterator[str]:
    """The texts of one column. Raises UserError with file and line for what is no such table.

    Quotes are those of RFC 4180. A TSV has one row a line: a quote that is not closed on its line is refused,
    because it would make one row of all up to the next quote.
    """
    part = span.part
    csv.field_size_limit(LONGEST_FIELD)
    delimiter, names = _header(part, field)
    column = names.index(field)
    with opened(part) as file:
        for line, row in itertools.islice(_rows(part, file, delimiter), 1, None):
            if len(row) != len(names):
                found = f"has {len(row)} columns, the header {len(names)}"
                raise _bad_line(part, line, found, "put a field that holds a delimiter in quotes")
            if "\0" in row[column]:
                raise _not_text(part)
            yield row[column]


def _header(part: Part, field: str) -> tuple[str, list[str]]:
    """The delimiter, and the names of the columns."""
    longest: list[str] = []
    for delimiter in DELIMITERS[part.format]:
        names = _first_row(part, delimiter)
        if names.count(field) > 1:
            found = f"{part.name} has {names.count(field)} columns '{field}'"
            raise UserError(part.asked, found, "give each column a name of its own")
        if field in names:
            return delimiter, names
        longest = max(longest, names, key=len)
    if any("\0" in name for name in longest):
        raise _not_text(part)
    raise no_column(part, field, longest)


def _first_row(part: Part, delimiter: str) -> list[str]:
    with opened(part) as file, suppress(csv.Error):
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        try:
            return next(filter(None, reader), [])
        except UnicodeDecodeError:
            raise _not_text(part) from None
    return []


def _rows(part: Part, file: BinaryIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row begins, and its fields; a blank line is no row."""
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    change = "write a quote within a quoted field twice, or write the rows as .jsonl"
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except UnicodeDecodeError:
            raise _not_text(part) from None
        except csv.Error as error:
            raise _bad_line(part, line, f"has a quote out of place ({error})", change) from None
        if row is None:
            return
        if delimiter == "\t" and reader.line_num > line:
            raise _bad_line(part, line, "has a quote that is not closed on its line", change)
        if row:
            yield line, row


def _not_text(part: Part) -> UserError:
    """The first line that is not UTF-8; it is looked for only now, when somebody wants to know it."""
    offset = 0
    with opened(part) as file:
        for line, data in enumerate(file, 1):
            try:
                encoding.decoded(data, offset)
            except encoding.NotText as error:
                return _bad_line(part, line, error.found, error.change)
            offset += len(data)
    raise AssertionError(f"{part.name} is UTF-8")


def _bad_line(part: Part, line: int, found: str, change: str) -> UserError:
    return UserError(part.asked, f"{part.name} line {line} {found}", change)
