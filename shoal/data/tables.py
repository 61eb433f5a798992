"""Tables become documents: the column `text_field` of CSV, TSV, Parquet and Arrow files, streamed."""

import csv
import io
from collections.abc import Callable, Iterator
from typing import Any

from shoal.data.sources import Part, Span, opened
from shoal.errors import UserError

ROWS_AT_ONCE = 1024
CSV_BLOCK_BYTES = 16 << 20  # the longest row that a CSV file may have


def read_table(span: Span, field: str) -> Iterator[str]:
    """The texts of one column; a missing value is an empty text. Raises UserError with file and row."""
    import pyarrow

    part, row = span.part, 0
    try:
        for row, column in COLUMN_READERS[part.format](span, field):
            for value in _as_bytes(column, part, field).to_pylist():
                row += 1
                yield _decoded(value or b"", part, row)
    except (pyarrow.ArrowException, OSError) as error:
        found = f"{part.name} is broken after row {row} ({' '.join(str(error).split())})"
        raise UserError(part.asked, found, "write or copy the file again") from error


def parquet_spans(part: Part, span_bytes: int) -> list[Span]:
    """A Parquet file cut into runs of row groups of about `span_bytes`, as counted before compression."""
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(part) as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        found = f"{part.name} is no whole Parquet file ({' '.join(str(error).split())})"
        raise UserError(part.asked, found, "write or copy the file again") from error
    spans, start, size = [], 0, 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        if size >= span_bytes or group == footer.num_row_groups - 1:
            spans.append(Span(part, size, start, group + 1))
            start, size = group + 1, 0
    return spans


def _csv_columns(span: Span, field: str) -> Iterator[tuple[int, Any]]:
    """Pairs of rows before, and the column of the rows that follow; so do the readers below."""
    import pyarrow
    import pyarrow.csv as arrow_csv

    delimiter = "\t" if span.part.format == "tsv" else ","
    with opened(span.part) as file:
        header = next(csv.reader(io.TextIOWrapper(file, "utf-8-sig", "replace"), delimiter=delimiter), [])
    _check_column(span.part, field, header)
    with opened(span.part) as file:
        batches = arrow_csv.open_csv(
            file,
            arrow_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow_csv.ConvertOptions(include_columns=[field], column_types={field: pyarrow.binary()}),
        )
        row = 0
        for batch in batches:
            yield row, batch.column(0)
            row += batch.num_rows


def _parquet_columns(span: Span, field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with opened(span.part) as file:
        table = pyarrow.parquet.ParquetFile(file)
        _check_column(span.part, field, table.schema_arrow.names)
        groups = range(table.metadata.num_row_groups)[span.start : span.stop]
        row = sum(table.metadata.row_group(group).num_rows for group in range(span.start))
        for batch in table.iter_batches(ROWS_AT_ONCE, list(groups), columns=[field], use_threads=False):
            yield row, batch.column(0)
            row += batch.num_rows


def _arrow_columns(span: Span, field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(span.part.name) as file:
        table = pyarrow.ipc.open_stream(file)
        _check_column(span.part, field, table.schema.names)
        row = 0
        for batch in table:
            yield row, batch.column(field)
            row += batch.num_rows


COLUMN_READERS: dict[str, Callable[[Span, str], Iterator[tuple[int, Any]]]] = {
    "csv": _csv_columns,
    "tsv": _csv_columns,
    "parquet": _parquet_columns,
    "arrow": _arrow_columns,
}


def _check_column(part: Part, field: str, names: list[str]) -> None:
    if field not in names:
        found = f"{part.name} has no column '{field}'"
        raise UserError(part.asked, found, f"set --text-field to one of: {', '.join(names)}")


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
