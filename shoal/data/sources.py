"""What a `--data` entry names: files, folders, globs, URLs and data sets become parts."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from shoal.data import builtin, compression, walking
from shoal.data.stores import archive, open_file, readable, store_errors, store_of
from shoal.data.walking import Found
from shoal.errors import UserError, first_line

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
    """One file of documents: `file` is its path or URL, `size` its bytes, `asked` the flag that named it."""

    file: str
    format: str
    size: int
    asked: str
    member: str = ""  # of a zip archive
    alone: bool = False  # whether it is the only part

    @property
    def name(self) -> str:
        """How a message speaks of it."""
        return f"{self.file}/{self.member}" if self.member else self.file

    @property
    def compressed(self) -> bool:
        """Whether the file must be read from its beginning."""
        return bool(compression.suffix_of(self.file))


@dataclass(frozen=True)
class Span:
    """A stretch of a part: bytes of a text or JSONL file, row groups of a Parquet file.

    `stop` None is the end of the part; `size` is about how many bytes there are to read.
    """

    part: Part
    size: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Sources:
    """The parts that entries name, in their order, and how many files were left out for which reason."""

    parts: list[Part]
    left_out: Counter[str] = field(default_factory=Counter)


def list_sources(entries: Sequence[str], flag: str = "--data") -> Sources:
    """What `entries` name; raises UserError for one that names nothing to read, or what cannot be read."""
    left_out: Counter[str] = Counter()
    parts = [part for entry in entries for part in _Entry(entry, f"{flag} {entry}", left_out).parts()]
    return Sources([replace(parts[0], alone=True)] if len(parts) == 1 else parts, +left_out)


@contextmanager
def opened(part: Part) -> Iterator[BinaryIO]:
    """The bytes of a part, decompressed; raises UserError where the store or the compression fails."""
    with store_errors(part.asked, part.name), ExitStack() as held:
        if part.member:
            stream = compression.unpacked(archive(part.file), part.member)
        else:
            stream = compression.decompressed(held.enter_context(open_file(part.file)), part.file)
        yield held.enter_context(stream)


@dataclass
class _Entry:
    """One word behind `--data`; what it names and is not read is counted in `left_out`."""

    word: str
    asked: str
    left_out: Counter[str]

    def parts(self) -> list[Part]:
        if self.word == "builtin":
            return list(_builtin_parts(self.asked))
        if self.word.startswith("hf:"):
            return self._of_hub(self.word.removeprefix("hf:"))
        with store_errors(self.asked):
            filesystem, path = store_of(self.word)
            return self._local(path) if filesystem is None else self._remote(filesystem, path)

    def _local(self, path: str) -> list[Part]:
        try:
            found = walking.look_at(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name with a NUL
            if os.path.islink(path):
                raise
            if any(sign in path for sign in walking.MAGIC):
                return self._matched(walking.matches(path, self.left_out))
            raise self._nothing() from None
        if found.is_folder:
            return self._saved(Path(path)) or self._among(walking.files_below(path, self.left_out), "folder")
        return self._single(found)

    def _remote(self, filesystem: Any, path: str) -> list[Part]:
        if filesystem.exists(path):
            if not filesystem.isdir(path):
                return self._single(_found_at(filesystem, path, filesystem.info(path)))
            root = PurePosixPath(filesystem._strip_protocol(path))
            every = filesystem.find(path, detail=True)
            hidden = {name for name in every if any(map(walking.is_hidden, _steps_below(root, name)))}
            self.left_out[walking.HIDDEN] += len(hidden)
            found = [_found_at(filesystem, name, every[name]) for name in sorted(every) if name not in hidden]
            return self._among(found, "folder")
        if any(sign in path for sign in walking.MAGIC):
            matched = filesystem.glob(path, detail=True)
            return self._matched([_found_at(filesystem, name, matched[name]) for name in sorted(matched)])
        raise self._nothing()

    def _matched(self, found: list[Found]) -> list[Part]:
        if not found:
            raise UserError(self.asked, "no file matches", "quote the pattern, or check it with ls")
        self.left_out["folder that the pattern matches"] += sum(one.is_folder for one in found)
        return self._among([one for one in found if not one.is_folder], "pattern")

    def _single(self, found: Found) -> list[Part]:
        """The parts of a file that was named itself, so that nothing of it may be left out unsaid."""
        if not found.is_file:
            raise UserError(self.asked, "neither a file nor a folder", "write what it holds to a file first")
        parts, others = self._contents(found)
        if not parts and compression.suffix_of(found.path) == compression.ARCHIVE:
            holds = f"it holds no {KNOWN_SUFFIXES} file" + (f", but {_some(others)}" if others else "")
            raise UserError(self.asked, holds, "unpack it, or rename what is in it")
        if not parts:
            raise UserError(
                self.asked, f"not one of the formats {KNOWN_SUFFIXES}", "rename or convert the file"
            )
        return self._filled(parts, others, "the file is empty")

    def _among(self, found: list[Found], holder: str) -> list[Part]:
        contents = [self._contents(one) for one in found]
        parts = [part for some, _ in contents for part in some]
        others = [name for _, some in contents for name in some]
        if not parts:
            rest = f", but {_some(others)}" if others else ""
            holds = f"the {holder} holds no {KNOWN_SUFFIXES} file{rest}"
            raise UserError(self.asked, holds, "name a folder or files that do")
        return self._filled(parts, others, f"every file of the {holder} is empty")

    def _filled(self, parts: list[Part], others: list[str], all_empty: str) -> list[Part]:
        """The parts that are not empty; the rest is counted."""
        self.left_out.update(PurePosixPath(name.lower()).suffix[:12] or "without a suffix" for name in others)
        self.left_out["empty"] += sum(part.size == 0 for part in parts)
        if not any(part.size for part in parts):
            raise UserError(self.asked, all_empty, "name files that hold text")
        return [part for part in parts if part.size]

    def _contents(self, found: Found) -> tuple[list[Part], list[str]]:
        """The parts of a file (several of a zip archive), and the names of what is not read of it."""
        if compression.suffix_of(found.path) != compression.ARCHIVE or not found.size:
            if kind := _format_of(found.path):
                return [Part(readable(found.path), kind, found.size, self.asked)], []
            return [], [found.path]
        with store_errors(self.asked, found.path):
            members = [one for one in archive(found.path).infolist() if not one.is_dir()]
        sizes = {one.filename: one.file_size for one in members}
        parts, others = [], []
        for member in sorted(sizes):
            nested = compression.suffix_of(member) == compression.ARCHIVE
            kind = None if nested else _format_of(member, _format_of(found.path))
            if any(map(walking.is_hidden, PurePosixPath(member).parts)):
                self.left_out[walking.HIDDEN] += 1
            elif kind:
                parts.append(Part(readable(found.path), kind, sizes[member], self.asked, member))
            else:
                others.append(member)
        return parts, others

    def _of_hub(self, name: str) -> list[Part]:
        """The Arrow files of a Hugging Face data set `NAME[:config][:split]`, downloaded where need be."""
        if Path(name).is_dir() and (parts := self._saved(Path(name))):
            return parts
        try:
            import datasets
        except ImportError:
            change = "pip install 'shoal[datasets]'"
            raise UserError(self.asked, "the package datasets is missing", change) from None
        path, config, split = [*name.split(":"), "", ""][:3]
        try:
            table = datasets.load_dataset(path, config or None, split=split or "train")
        except Exception as error:  # the hub's failures have no common type
            raise UserError(
                self.asked, first_line(error), "check the name as hf:NAME:CONFIG:SPLIT"
            ) from error
        return self._arrow([Path(file["filename"]) for file in table.cache_files])

    def _saved(self, folder: Path) -> list[Part]:
        """The Arrow files of a folder that `datasets` saved (its `train` split); none for any other folder."""
        if splits := _record(folder / "dataset_dict.json").get("splits"):
            if "train" not in splits:
                change = f"name one: {folder}/SPLIT"
                raise UserError(self.asked, f"no split train, but {', '.join(splits)}", change)
            self.left_out.update(f"split {split}" for split in splits if split != "train")
            folder = folder / "train"
        state = _record(folder / "state.json")
        return self._arrow([folder / file["filename"] for file in state.get("_data_files", [])])

    def _arrow(self, files: list[Path]) -> list[Part]:
        return [Part(readable(str(file)), "arrow", file.stat().st_size, self.asked) for file in files]

    def _nothing(self) -> UserError:
        change = "name a file, a folder, a glob, a URL, builtin or hf:DATASET"
        return UserError(self.asked, "no such file or folder", change)


def _builtin_parts(asked: str) -> Iterator[Part]:
    documentation = builtin.documentation_file()
    if documentation.is_file():
        yield Part(str(documentation), "topics", documentation.stat().st_size, asked)
    for file in builtin.source_files():
        yield Part(str(file), "text", file.stat().st_size, asked)


def _record(file: Path) -> dict[str, Any]:
    """What a JSON file of `datasets` says; nothing where there is none, or another's of the same name."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _format_of(name: str, otherwise: str | None = None) -> str | None:
    """What a file holds, by its name; `otherwise` where that has no suffix at all."""
    suffix = PurePosixPath(compression.without_suffix(name).lower()).suffix
    return FORMAT_OF_SUFFIX.get(suffix) if suffix else otherwise


def _found_at(filesystem: Any, path: str, info: dict[str, Any]) -> Found:
    url, kind = str(filesystem.unstrip_protocol(path)), info["type"]
    return Found(url, kind == "directory", kind == "file", info["size"] or 0)


def _steps_below(root: PurePosixPath, name: str) -> tuple[str, ...]:
    return PurePosixPath(name).relative_to(root).parts


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
