"""Compressed files as streams: every member, stream and frame of them, or `Broken`."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 16
ARCHIVE = ".zip"


class Broken(Exception):
    """What claims to be compressed and is not, or not whole; the text says what was found."""


def suffix_of(name: str) -> str:
    """The suffix of a name that stands for a compression, in small letters, or nothing."""
    suffix = PurePath(name.lower()).suffix
    return suffix if suffix == ARCHIVE or suffix in STREAMS else ""


def without_suffix(name: str) -> str:
    """The name of what is compressed."""
    return name[: len(name) - len(suffix_of(name))]


@contextmanager
def decompressed(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """What is in a file called `name`, of a plain file the file itself.

    What is compressed can be read from its beginning only. Raises Broken, then or while it is read.
    """
    if suffix := suffix_of(name):
        with _failures():
            stream = STREAMS[suffix](file)
        yield io.BufferedReader(_Reader(stream), BLOCK_BYTES)
    else:
        yield file


@contextmanager
def unpacked(archive: zipfile.ZipFile, member: str) -> Iterator[BinaryIO]:
    """What is in a member of an archive, decompressed once more where its name says so. Raises Broken as above."""
    with ExitStack() as held:
        with _failures():
            inner = held.enter_context(archive.open(member))
        yield held.enter_context(decompressed(io.BufferedReader(_Reader(inner)), member))


def archive_in(file: BinaryIO) -> zipfile.ZipFile:
    """The zip archive in a file; raises Broken for what is none."""
    with _failures():
        return zipfile.ZipFile(file)


class _Reader(io.RawIOBase):
    """The bytes of a decompressor, whose failures are Broken."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def readable(self) -> bool:
        """It can be read, and nothing else."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the front of a buffer; 0 at the end. Raises Broken."""
        with _failures():
            data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Streams:
    """One stream after another, as in `cat a.xz b.xz`.

    Python's own readers take a second stream that is damaged for the end of the file, without a word.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self.file, self.new = file, new
        self.stream: Any = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end of the last stream."""
        while True:
            if self.stream is None or self.stream.eof:
                block = self._start_of_next()
                if not block:
                    return b""
                self.stream = self.new()
            else:
                block = self.file.read(BLOCK_BYTES) if self.stream.needs_input else b""
                if self.stream.needs_input and not block:
                    raise EOFError("it ends too early")
            if data := self.stream.decompress(block, size):
                return bytes(data)

    def _start_of_next(self) -> bytes:
        block = self.stream.unused_data if self.stream else b""
        while not (block := block.lstrip(b"\0")):  # zeros between streams are padding
            block = self.file.read(BLOCK_BYTES)
            if not block:
                return b""
        return bytes(block)


def _zstandard(file: BinaryIO) -> Any:
    import pyarrow  # brings libzstd, and reads every frame

    return pyarrow.CompressedInputStream(file, "zstd")


STREAMS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file: _Streams(file, bz2.BZ2Decompressor),
    ".xz": lambda file: _Streams(file, lzma.LZMADecompressor),
    ".lzma": lambda file: _Streams(file, lzma.LZMADecompressor),
    ".zst": _zstandard,
}


# The libraries share no base of errors; a missing password is a RuntimeError, a missing member a KeyError.
FAILURES = (
    EOFError, OSError, RuntimeError, ValueError, KeyError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise Broken(" ".join(str(error).split()) or type(error).__name__) from error
