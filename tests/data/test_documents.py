"""Whatever the format and however it is cut, the documents are those that are in it."""

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import some_text

from shoal.data import builtin, documents
from shoal.data.documents import read_documents, spans_of
from shoal.data.sources import Part, Span, list_sources
from shoal.errors import UserError

TEXTS = [some_text(seed, 3 + seed % 17) for seed in range(100)]


def read(part: Part, span_bytes: int = 1 << 30) -> list[str]:
    return [text for span in spans_of(part, span_bytes) for text in read_documents(span, "text")]


def part_of(path: Path) -> Part:
    (part,) = list_sources([str(path)]).parts
    return part


@pytest.mark.parametrize("span_bytes", [7, 100, 1000, 1 << 20])
@pytest.mark.parametrize(
    "content",
    ["\n".join(TEXTS), "no line end at all, 潮🐟ä " * 50, "a\r\nb\r\n" * 40, "\n", "last line ends\n" * 30],
)
def test_pieces_of_a_text_are_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, span_bytes: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(content.encode())
    part = part_of(tmp_path / "a.txt")
    spans = spans_of(part, span_bytes)
    pieces = [piece for span in spans for piece in documents.READERS["text"](span, "")]
    assert "".join(pieces) == content
    assert max(len(piece.encode()) for piece in pieces) <= 64
    assert sum(span.size for span in spans) == part.size


def test_pieces_end_where_no_tokenizer_joins_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    (tmp_path / "a.txt").write_text("def f():\n    x\n\n\ny = 1\n" * 100)
    pieces = read(part_of(tmp_path / "a.txt"))
    assert len(pieces) > 5
    for before, after in itertools.pairwise(pieces):
        assert before.endswith("\n")
        assert not before[-2].isspace()
        assert not after[0].isspace()


@pytest.mark.parametrize("span_bytes", [150, 1000, 1 << 20])
@pytest.mark.parametrize("end", ["\n", ""])
def test_rows_of_jsonl(tmp_path: Path, span_bytes: int, end: str) -> None:
    rows = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_text(rows + end)
    assert read(part_of(tmp_path / "a.jsonl"), span_bytes) == TEXTS


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_rows_of_csv(tmp_path: Path, suffix: str, delimiter: str, mark: str, end: str) -> None:
    texts = [" ".join(text.split("\n")) for text in TEXTS] if delimiter == "\t" else TEXTS
    with (tmp_path / f"a.{suffix}").open("w", newline="", encoding=mark) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["id", "text", "long" * 50_000])
        writer.writerows((number, text, '"') for number, text in enumerate(texts))
        writer.writerow([-1, "x" * 200_000, ""])
    assert read(part_of(tmp_path / f"a.{suffix}")) == [*texts, "x" * 200_000]


@pytest.mark.parametrize("span_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_rows_of_parquet(tmp_path: Path, span_bytes: int, kind: object) -> None:
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"n": range(len(TEXTS)), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=13)
    assert read(part_of(tmp_path / "a.parquet"), span_bytes) == TEXTS


def test_empty_rows_are_no_documents_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": " \\n"}\n{"text": "x"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", None, " ", "x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        part, skipped = part_of(tmp_path / name), Counter[str]()
        assert list(read_documents(Span(part, part.size), "text", skipped)) == ["x"]
        assert skipped == {"empty": 1, "null": 1, "white space": 1}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8-sig")
    assert read(part_of(tmp_path / "a.txt")) == ["a"]
    row = '{"text": "a"}\n'.encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(row * 2)  # as cat joins two files
    assert read(part_of(tmp_path / "a.jsonl")) == ["a", "a"]


def test_a_number_of_any_length_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": %s}\n{"text": %s}\n' % (("7" * 5000,) * 2))
    part = part_of(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"line 2 has a field 'text' that is \w+, not text"):
        read(part)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": %s}\n' % ("7" * 5000))
    assert read(part) == ["a"]


def test_the_builtin_corpus_is_the_library_without_its_tests() -> None:
    parts = list_sources(["builtin"]).parts
    names = [part.name for part in parts]
    assert parts == list_sources(["builtin"]).parts
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)
    topics = list(read_documents(Span(parts[0], parts[0].size), ""))
    assert len(topics) > 50
    texts = (text for part in parts[1:] for text in documents.READERS["text"](Span(part, part.size), ""))
    sizes = [file.stat().st_size for file in builtin.source_files()]
    assert sum(len(text.encode()) for text in texts) == sum(sizes)
