"""What an entry names, and the one line that bad input gets."""

import errno
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import Data, documents_of, files_of

from shoal.data import units
from shoal.data.documents import read_documents
from shoal.data.fingerprints import fingerprints
from shoal.data.prepare import prepare
from shoal.data.sources import Span, list_sources
from shoal.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder of several formats."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.md", "deep/c.JSONL", "deep/d.csv.gz", "_x/e.txt", ".y/f.txt", "g.bin"):
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).write_text('{"text": "x"}')
    Path("data/empty.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("data", ["data/a.md", "data/b.txt", "data/deep/c.JSONL", "data/deep/d.csv.gz"]),
        ("data/b.txt", ["data/b.txt"]),
        ("data/*", ["data/a.md", "data/b.txt"]),
        ("data/**/*.JSONL", ["data/deep/c.JSONL"]),
        ("data/[bc].txt", ["data/b.txt"]),
    ],
)
def test_files_of_an_entry(here: Path, entry: str, names: list[str]) -> None:
    assert [part.name for part in list_sources([entry]).parts] == names
    assert [part.name for part in list_sources([str(here / entry)]).parts] == names


@pytest.mark.parametrize(
    ("entry", "left_out"),
    [
        ("data", {"hidden (. or _)": 2, ".bin": 1, "empty": 1}),
        ("data/*", {".bin": 1, "empty": 1, "folder that the pattern matches": 2}),
        ("data/**", {"hidden (. or _)": 2, ".bin": 1, "empty": 1}),
        ("data/b.txt", {}),
    ],
)
def test_what_is_not_read_is_counted(here: Path, entry: str, left_out: dict[str, int]) -> None:
    assert list_sources([entry]).left_out == left_out


def test_a_linked_folder_is_read_once(here: Path) -> None:
    Path("elsewhere/below").mkdir(parents=True)
    Path("elsewhere/below/z.txt").write_text("z")
    Path("data/deep/back").symlink_to(here / "data")
    Path("data/linked").symlink_to("../elsewhere")
    Path("data/linked-again").symlink_to("../elsewhere/below")
    Path("data/y.txt").symlink_to(here / "elsewhere/below/z.txt")
    found = list_sources(["data"])
    assert sum(part.name.endswith("/z.txt") for part in found.parts) == 1
    assert "data/y.txt" in [part.name for part in found.parts]
    assert found.left_out["link to a folder that is read already"] == 2
    again = [part.name for part in list_sources(["data/**/*.txt"]).parts]
    assert again == [part.name for part in found.parts if part.name.endswith(".txt")]


@pytest.mark.parametrize("entry", ["data", "data/**/*.txt"])
def test_a_folder_that_cannot_be_listed_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    list_names = os.listdir

    def denied(folder: str) -> list[str]:
        if str(folder).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return list_names(folder)

    monkeypatch.setattr(os, "listdir", denied)  # root, who may run the tests, may list every folder
    with pytest.raises(
        UserError, match=r"--data .*Permission denied.*deep'; check that it is there and may be"
    ):
        list_sources([entry])


def test_a_link_to_nothing_is_refused(here: Path) -> None:
    Path("data/gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match=r"--data data: .*No such file or directory.*data/gone\.txt"):
        list_sources(["data"])
    Path("data/gone.txt").unlink()
    Path("data/.gone.txt").symlink_to("nowhere.txt")
    assert list_sources(["data"]).parts


def test_what_is_neither_file_nor_folder_is_not_waited_for(here: Path) -> None:
    os.mkfifo("data/pipe.txt")
    assert list_sources(["data"]).left_out["neither file nor folder"] == 1
    with pytest.raises(UserError, match=r"--data data/pipe\.txt: neither a file nor a folder"):
        list_sources(["data/pipe.txt"])


@pytest.mark.parametrize("name", ["Smith, John.txt", "what?[1]*.txt", "a::b.txt"])
def test_a_name_is_first_of_all_a_name(here: Path, name: str) -> None:
    Path(name).write_text("x")
    (part,) = list_sources([name]).parts
    assert part.name == name
    assert list(read_documents(Span(part, 1), "")) == ["x"]


def test_entries_keep_their_order(here: Path) -> None:
    assert [part.name for part in list_sources(["data/b.txt", "data/a.md"]).parts] == [
        "data/b.txt",
        "data/a.md",
    ]


def test_a_saved_data_set_is_read_without_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(30)]
    table = datasets.Dataset.from_dict({"text": [*reversed(texts)]}).select(range(29, -1, -1))
    table.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "many")
    for entry in (str(tmp_path / "one"), f"hf:{tmp_path / 'one'}", str(tmp_path / "many")):
        parts = list_sources([entry]).parts
        read = [text for part in parts for text in read_documents(Span(part, part.size), "text")]
        assert read == texts
    (test,) = list_sources([str(tmp_path / "many" / "test")]).parts
    assert list(read_documents(Span(test, test.size), "text")) == texts[:1]


def test_a_data_set_of_the_hugging_face_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.jsonl").write_text(f'{{"text": "of {split}"}}\n')
    for split in ("train", "test"):
        (part,) = list_sources([f"hf:{tmp_path / 'set'}::{split}"]).parts
        assert list(read_documents(Span(part, part.size), "text")) == [f"of {split}"]


PARQUET = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"body": ["x"] * 1000, "n": range(1000)}), PARQUET)
PARQUET_BYTES = PARQUET.getvalue().to_pybytes()

BAD = [
    # entry, content of a.*, found, change
    ("nowhere.txt", None, "no such file or folder", "name a file"),
    ("nowhere/*.txt", None, "no file matches", "quote the pattern"),
    ("a.txt", b"", "the file is empty", "hold text"),
    ("a.bin", b"x", "not one of the formats .txt", "rename or convert"),
    ("a.txt", b"one\n\0\1\2", "a.txt line 2 holds a NUL byte", "name a text file"),
    ("a.txt", b"one\ntwo \xff three", "a.txt line 2 is not UTF-8 (byte 0xff at 8)", "iconv"),
    ("a.txt", b" \n ", "no documents", "name files"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "broken compression", "compress the file again"),
    ("a.txt.gz", b"not gzip", "broken compression", "compress the file again"),
    ("a.jsonl", b'{"text": "x"}\n{"b": 1, "c": 2}\n', "a.jsonl line 2 has no field 'text'", "one of: b, c"),
    ("a.jsonl", b'{"\\u001b[2J\\u0000x": 1}\n', "line 1 has no field 'text'", "one of: \x1b[2J"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": 7}\n', "line 3 has a field 'text' that is int", "--text-field"),
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is not JSON (Expecting value at column 1)", "jq -c"),
    ("a.json", b'["x"]\n', "line 1 is not a JSON object", "jq -c '.[]'"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half a character", "UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9", "iconv"),
    ("a.csv", b"id,body\n1,x\n", "a.csv has no column 'text'", "id, body"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 9999 + b"\n", "line 2 is nested too deeply", "without what is nested"),
    ("a.txt", "Bücher\n".encode("utf-16"), "a.txt line 1 is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    ("a.csv", "id,text\n1,Bücher\n".encode("utf-16"), "a.csv line 1 is UTF-16, not UTF-8", "iconv -f UTF-16"),
    ("a.csv", "id,text\n1,Bücher\n".encode("utf-16-le"), "a.csv line 1 holds a NUL byte", "iconv"),
    ("a.csv", b"id,text\n1,x\n2,\xff\n", "a.csv line 3 is not UTF-8", "UTF-8"),
    ("a.csv", b"id,text\n1,x\n2\n", "a.csv line 3 has 1 columns, the header 2", "in quotes"),
    ("a.csv", b"text,id,text\nx,1,y\n", "a.csv has 2 columns 'text'", "a name of its own"),
    ("a.csv", b" text," + b"c" * 140_000 + b"\n1,x\n", "a.csv has no column 'text'", "one of: ' text', ccc"),
    ("a.csv", b'id,text\n1,"x\n2,y\n3,z\n', "a.csv line 2 has a quote out of place", "twice"),
    ("a.csv", b'id,text\n1,x\n2,"a\\"b"\n', "a.csv line 3 has a quote out of place", "twice"),
    ("a.tsv", b'id\ttext\n1\tx\n2\t"y\n3\tz"\n', "a.tsv line 3 has a quote that is not closed", "twice"),
    ("a.jsonl.zip", b"PK no zip", "a.jsonl.zip has broken compression", "compress the file again"),
    ("a.jsonl.xz", b"no xz at all", "a.jsonl.xz has broken compression", "compress the file again"),
    ("a.jsonl.zst", b"no zst at all", "a.jsonl.zst has broken compression", "compress the file again"),
    ("a.parquet", PARQUET_BYTES[:-50], "a.parquet is broken", "write or copy the file again"),
    ("a.parquet", PARQUET_BYTES, "a.parquet has no column 'text'", "body, n"),
    ("s3x://bucket/a.txt", None, "Protocol not known", "check the address"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "content", "found", "change"), BAD)
def test_bad_input_is_one_line_and_leaves_no_corpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: str,
    content: bytes | None,
    found: str,
    change: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(entry).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(Data([entry], str(tmp_path / "cache")), report=lambda line: None)
    assert caught.value.asked == f"--data {entry}"
    assert found in caught.value.found
    assert change in caught.value.change
    assert str(caught.value).isprintable()
    assert not [f for f in files_of(tmp_path) if re.match(r"cache/(corpora|tokenizers)/\w+/", f)]


def test_a_folder_or_pattern_without_text(here: Path) -> None:
    Path("none").mkdir()
    Path("none/a.bin").write_text("x")
    with pytest.raises(UserError, match=r"--data none: the folder holds no \.txt, \.md"):
        list_sources(["none"])
    with pytest.raises(UserError, match=r"--eval-path none/\*: the pattern holds no \.txt, \.md"):
        list_sources(["none/*"], "--eval-path")
    Path("a.zip").write_bytes(b"PK\5\6" + bytes(18))
    with pytest.raises(UserError, match=r"\.parquet file; unpack it"):
        list_sources(["a.zip"])
    Path("none/b.txt").touch()
    with pytest.raises(UserError, match="every file of the folder is empty"):
        list_sources(["none"])


def test_the_line_of_an_error_is_of_the_file_not_of_the_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(400)) + "{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 401 has no field 'text'; set .* one of: none"):
        prepare(Data([str(tmp_path / "a.jsonl")], str(tmp_path / "cache")), report=lambda line: None)


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """The address of moto's server, which speaks S3 on loopback."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_an_object_store_is_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, object_store: str
) -> None:
    import boto3

    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 500)
    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = boto3.client("s3")
    store.create_bucket(Bucket="shoal")
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200))
    contents = {"a.jsonl": rows.encode(), "b/c.txt": b"text\n" * 50, "d.parquet": parquet_of(["x", "y"])}
    for name, content in contents.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
        store.put_object(Bucket="shoal", Key=f"corpus/{name}", Body=content)

    def prepared(entry: str) -> Path:
        return prepare(Data([entry], str(tmp_path / "cache"), eval_fraction=0.2), "train", print, 2)

    remote, local = prepared("s3://shoal/corpus"), prepared(str(tmp_path / "local"))
    assert documents_of(remote, "train") == documents_of(local, "train")
    assert documents_of(remote, "eval") == documents_of(local, "eval")
    assert [p.name for p in list_sources(["s3://shoal/corpus/*.jsonl"]).parts] == [
        "s3://shoal/corpus/a.jsonl"
    ]
    (tag,) = fingerprints(list_sources(["s3://shoal/corpus/a.jsonl"]).parts, tmp_path / "cache", print)
    assert tag.startswith("etag:")
    with pytest.raises(UserError, match=r"--data s3://shoal/other: no such file or folder"):
        list_sources(["s3://shoal/other"])


def parquet_of(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return bytes(sink.getvalue().to_pybytes())
