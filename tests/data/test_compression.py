"""All of a compressed file is read, or it is refused."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shoal.data.documents import read_documents
from shoal.data.sources import Span, list_sources
from shoal.errors import UserError

HALVES = [[f"row {number} of {half}, " * 50 for number in range(40)] for half in ("one", "two")]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstandard(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def zipped(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}
SKIPPABLE = b"\x50\x2a\x4d\x18\x02\0\0\0no"  # a frame without content, as pzstd writes
each_stream = pytest.mark.parametrize("suffix", STREAMS)


def read(path: Path) -> list[str]:
    parts = list_sources([str(path)]).parts
    return [text for part in parts for text in read_documents(Span(part, part.size), "text")]


@each_stream
def test_every_stream_of_a_file_is_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.json.{suffix}"
    first, second = (STREAMS[suffix](jsonl(half)) for half in HALVES)
    between = {"xz": bytes(8), "zst": SKIPPABLE}.get(suffix, b"")
    file.write_bytes(first + between + second)
    assert read(file) == HALVES[0] + HALVES[1]


@each_stream
@pytest.mark.parametrize("damage", ["torn", "second stream torn", "second stream unknown", "changed"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = STREAMS[suffix](jsonl(HALVES[0]))
    middle = len(whole) // 2
    content = {
        "torn": whole[:middle],
        "second stream torn": whole + whole[:middle],
        "second stream unknown": whole + b"?" + whole[1:],
        "changed": whole[:middle] + bytes(byte ^ 255 for byte in whole[middle:]),
    }[damage]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"a\.jsonl\.{suffix} has broken compression \(.+\); copy or compress"
    ):
        read(tmp_path / f"a.jsonl.{suffix}")


def test_every_member_of_an_archive_is_read_or_counted(tmp_path: Path) -> None:
    contents = {
        "b.jsonl": jsonl(HALVES[1]),
        "a/a.jsonl.gz": gzip.compress(jsonl(HALVES[0])),
        "a/": b"",
        "__MACOSX/._b.jsonl": b"?",
        "a/cover.PNG": b"?",
        "c.txt": b"",
        "inner.zip": zipped({"d.txt": b"d"}),
    }
    (tmp_path / "a.zip").write_bytes(zipped(contents))
    assert read(tmp_path / "a.zip") == HALVES[0] + HALVES[1]
    assert list_sources([str(tmp_path / "a.zip")]).left_out == {
        ".png": 1, ".zip": 1, "hidden (. or _)": 1, "empty": 1
    }  # fmt: skip
    assert list_sources([str(tmp_path)]).left_out == list_sources([str(tmp_path / "a.zip")]).left_out


def test_members_without_a_suffix_are_what_the_archive_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zip").write_bytes(zipped({"part-0": jsonl(HALVES[0]), "part-1": jsonl(HALVES[1])}))
    assert read(tmp_path / "a.jsonl.zip") == HALVES[0] + HALVES[1]


def test_an_archive_of_nothing_known_names_its_members(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"a.pdf": b"x", "b.doc": b"y"}))
    with pytest.raises(UserError, match=r"it holds no \.txt.* file, but a\.pdf, b\.doc"):
        list_sources([str(tmp_path / "a.zip")])


def test_a_changed_member_is_one_line(tmp_path: Path) -> None:
    whole = bytearray(zipped({"a.txt": b"text " * 1000}))
    whole[45] ^= 255
    (tmp_path / "a.zip").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.zip/a\.txt has broken compression"):
        read(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", ["gz", "zst", "zip"])
def test_a_parquet_file_that_is_compressed_once_more(tmp_path: Path, suffix: str) -> None:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": HALVES[0]}), sink)
    data = bytes(sink.getvalue().to_pybytes())
    content = zipped({"a.parquet": data}) if suffix == "zip" else STREAMS[suffix](data)
    (tmp_path / f"a.parquet.{suffix}").write_bytes(content)
    assert read(tmp_path / f"a.parquet.{suffix}") == HALVES[0]
