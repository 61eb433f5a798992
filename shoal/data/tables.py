"""Tables become documents: the column `text_field` of Parquet and Arrow files, streamed."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from shoal.data.sources import Part, Span, opened
from shoal.errors import UserError, first_line

ROWS_AT_ONCE = 1024
MOST_SHOWN, LONGEST_SHOWN = 20, 60


def read_table(span: Span, field: str) -> Iterator[str | None]:
    """The texts of one column, None where a value is missing. Raises UserError with file and row."""
    import pyarrow

    part, row = span.part, 0
    try:
        for row, column in COLUMN_READERS[part.format](span, field):
            for value in _as_bytes(column, part, field).to_pylist():
                row += 1
                yield None if value is None else _decoded(value, part, row)
    except (pyarrow.ArrowException, OSError) as error:
        found = f"{part.name} is broken after row {row} ({first_line(error)})"
        raise UserError(part.asked, found, "write or copy the file again") from error


def parquet_spans(part: Part, span_bytes: int) -> list[Span]:
    """A Parquet file cut into runs of row groups of about `span_bytes`, as counted before compression."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _seekable(part) as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        found = f"{part.name} is no whole Parquet file ({first_line(error)})"
        raise UserError(part.asked, found, "write or copy the file again") from error
    spans, start, size = [], 0, 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        if size >= span_bytes or group == footer.num_row_groups - 1:
            spans.append(Span(part, size, start, group + 1))
            start, size = group + 1, 0
    return spans


@contextmanager
def _seekable(part: Part) -> Iterator[BinaryIO]:
    """A Parquet file is read from its end; one that is compressed as a whole is unpacked for that, on disk."""
    with opened(part) as file:
        if not part.compressed:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            yield unpacked


def _parquet_columns(span: Span, field: str) -> Iterator[tuple[int, Any]]:
    """Pairs of rows before, and the column of the rows that follow; so does the reader below."""
    import pyarrow.parquet

    with _seekable(span.part) as file:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise no_column(span.part, field, table.schema_arrow.names)
        groups = range(table.metadata.num_row_groups)[span.start : span.stop]
        row = sum(table.metadata.row_group(group).num_rows for group in range(span.start))
        for batch in table.iter_batches(ROWS_AT_ONCE, list(groups), columns=[field], use_threads=False):
            yield row, batch.column(0)
            row += batch.num_rows


def _arrow_columns(span: Span, field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(span.part.file) as file:
        table = pyarrow.ipc.open_stream(file)
        if field not in table.schema.names:
            raise no_column(span.part, field, table.schema.names)
        row = 0
        for batch in table:
            yield row, batch.column(field)
            row += batch.num_rows


COLUMN_READERS: dict[str, Callable[[Span, str], Iterator[tuple[int, Any]]]] = {
    "parquet": _parquet_columns,
    "arrow": _arrow_columns,
}


def no_column(part: Part, field: str, names: Sequence[str]) -> UserError:
    """The error where a table of columns `names` has none called `field`."""
    found = f"{part.name} has no column '{field}'"
    return UserError(part.asked, found, f"set --text-field to one of: {shown(names)}")


def shown(names: Sequence[str]) -> str:
    """Names of fields in a message: the first ones, shortened, in quotes where they begin or end in a space."""
    short = [
        name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..." for name in names[:MOST_SHOWN]
    ]
    text = ", ".join(repr(name) if name != name.strip() or not name else name for name in short)
    return text + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")


def _as_bytes(column: Any, part: Part, field: str) -> Any:
    """The column as bytes, because pyarrow's own decoding does not say which row is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) not in ("string", "large_string", "string_view", "binary", "large_binary", "null"):
        found = f"{part.name} has a column '{field}' of {column.type}, not of text"
        raise UserError(part.asked, found, "set --text-field to a column of text")
    return column.cast(pyarrow.large_binary())


def _decoded(value: bytes, part: Part, row: int) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        found = f"{part.name} row {row} is not UTF-8 (byte 0x{value[error.start]:02x})"
        raise UserError(part.asked, found, "write the file in UTF-8") from None
