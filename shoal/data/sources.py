"""What a `--data` entry names: files, folders, globs, URLs and data sets become parts."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
from fsspec.utils import infer_compression

from shoal.data import builtin
from shoal.errors import UserError

FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
KNOWN_SUFFIXES = ", ".join(FORMAT_OF_SUFFIX)


@dataclass(frozen=True)
class Part:
    """One file of documents: `name` is its path or URL, `size` its bytes, `asked` the flag that named it."""

    name: str
    format: str
    size: int
    asked: str
    alone: bool = False  # whether it is all there is

    @property
    def compressed(self) -> bool:
        """Whether the file must be read from its beginning."""
        return infer_compression(self.name) is not None


@dataclass(frozen=True)
class Span:
    """A stretch of a part: bytes of a text or JSONL file, row groups of a Parquet file.

    `stop` None is the end of the part; `size` is about how many bytes there are to read.
    """

    part: Part
    size: int
    start: int = 0
    stop: int | None = None


def list_parts(entries: Sequence[str], flag: str = "--data") -> list[Part]:
    """The parts that `entries` name, in that order; raises UserError for one that names nothing to read."""
    parts = [part for entry in entries for part in _parts_of(entry, f"{flag} {entry}")]
    return [replace(parts[0], alone=True)] if len(parts) == 1 else parts


@contextmanager
def opened(part: Part) -> Iterator[BinaryIO]:
    """The bytes of a part, decompressed; raises UserError where the store or the compression fails."""
    with _store_errors(part.asked), fsspec.open(part.name, "rb", compression="infer") as file:
        yield file


def fingerprint(part: Part) -> str:
    """A name for what is in a part: SHA-256 of its bytes, or the tag that an object store keeps of them."""
    with _store_errors(part.asked):
        filesystem, path = fsspec.core.url_to_fs(part.name)
        info = {} if _is_local(filesystem) else filesystem.info(path)
        tag = info.get("ETag") or info.get("etag")
        if tag:
            return f"etag:{tag}"
        with filesystem.open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _parts_of(entry: str, asked: str) -> list[Part]:
    if entry == "builtin":
        return list(_builtin_parts(asked))
    if entry.startswith("hf:"):
        return _hub_parts(entry.removeprefix("hf:"), asked)
    with _store_errors(asked):
        filesystem, path = fsspec.core.url_to_fs(entry)
        exists = filesystem.exists(path)
        if exists and filesystem.isdir(path):
            saved = _saved_parts(Path(path), asked) if _is_local(filesystem) else []
            return saved or _folder_parts(filesystem, path, asked)
        if exists:
            return [_file_part(filesystem, path, asked)]
        if any(sign in path for sign in "*?["):
            return _glob_parts(filesystem, path, asked)
    change = "name a file, a folder, a glob, a URL, builtin or hf:DATASET"
    raise UserError(asked, "no such file or folder", change)


def _builtin_parts(asked: str) -> Iterator[Part]:
    documentation = builtin.documentation_file()
    if documentation.is_file():
        yield Part(str(documentation), "topics", documentation.stat().st_size, asked)
    for file in builtin.source_files():
        yield Part(str(file), "text", file.stat().st_size, asked)


def _file_part(filesystem: Any, path: str, asked: str) -> Part:
    kind = _format_of(path)
    if kind is None:
        raise UserError(asked, f"not one of the formats {KNOWN_SUFFIXES}", "rename or convert the file")
    size = filesystem.size(path)
    if size == 0:
        raise UserError(asked, "the file is empty", "name a file that holds text")
    return Part(_readable_name(filesystem, path), kind, size, asked)


def _folder_parts(filesystem: Any, path: str, asked: str) -> list[Part]:
    files = filesystem.find(path, detail=True)
    root = PurePosixPath(filesystem._strip_protocol(path))
    visible = {
        name: info
        for name, info in files.items()
        if not any(step.startswith((".", "_")) for step in PurePosixPath(name).relative_to(root).parts)
    }
    return _parts_among(filesystem, visible, asked, "the folder")


def _glob_parts(filesystem: Any, pattern: str, asked: str) -> list[Part]:
    found = filesystem.glob(pattern, detail=True)
    if not found:
        raise UserError(asked, "no file matches", "quote the pattern, or check it with ls")
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    return _parts_among(filesystem, files, asked, "the pattern")


def _parts_among(filesystem: Any, files: dict[str, Any], asked: str, holder: str) -> list[Part]:
    known = {name: kind for name in sorted(files) if (kind := _format_of(name))}
    if not known:
        raise UserError(asked, f"{holder} holds no {KNOWN_SUFFIXES} file", "name a folder or files that do")
    parts = [
        Part(_readable_name(filesystem, name), kind, files[name]["size"], asked)
        for name, kind in known.items()
        if files[name]["size"] > 0
    ]
    if not parts:
        raise UserError(asked, f"every file of {holder} is empty", "name files that hold text")
    return parts


def _hub_parts(name: str, asked: str) -> list[Part]:
    """The Arrow files of a Hugging Face data set `NAME[:config][:split]`, downloaded where need be."""
    if Path(name).is_dir() and (parts := _saved_parts(Path(name), asked)):
        return parts
    try:
        import datasets
    except ImportError:
        raise UserError(asked, "the package datasets is missing", "pip install 'shoal[datasets]'") from None
    path, config, split = [*name.split(":"), "", ""][:3]
    try:
        table = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the hub's failures have no common type
        raise UserError(asked, _one_line(error), "check the name as hf:NAME:CONFIG:SPLIT") from error
    return _arrow_parts([Path(file["filename"]) for file in table.cache_files], asked)


def _saved_parts(folder: Path, asked: str) -> list[Part]:
    """The Arrow files of a folder that `datasets` saved (its `train` split); none for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits:
            change = f"name one: {folder}/SPLIT"
            raise UserError(asked, f"no split train, but {', '.join(splits)}", change)
        folder = folder / "train"
    if not (folder / "state.json").is_file():
        return []
    state = json.loads((folder / "state.json").read_text())
    return _arrow_parts([folder / file["filename"] for file in state["_data_files"]], asked)


def _arrow_parts(files: list[Path], asked: str) -> list[Part]:
    return [Part(str(file), "arrow", file.stat().st_size, asked) for file in files]


def _format_of(path: str) -> str | None:
    pure = PurePosixPath(path.lower())
    if infer_compression(path) is not None:
        pure = pure.with_suffix("")
    return FORMAT_OF_SUFFIX.get(pure.suffix)


def _is_local(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _readable_name(filesystem: Any, path: str) -> str:
    """A local path as seen from here, or the full URL."""
    if not _is_local(filesystem):
        return str(filesystem.unstrip_protocol(path))
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


@contextmanager
def _store_errors(asked: str) -> Iterator[None]:
    """Turn what a file system says into one line; the libraries behind the URLs share no base of errors."""
    try:
        yield
    except (UserError, UnicodeDecodeError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(asked, f"broken compression ({error})", "copy or compress the file again") from error
    except OSError as error:
        raise UserError(asked, _one_line(error), "check that it is there and may be read") from error
    except Exception as error:
        if "://" not in asked:
            raise
        raise UserError(asked, _one_line(error), "check the address, and the access to it") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
