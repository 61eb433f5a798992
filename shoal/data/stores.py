"""Where files lie: a local disk, or a store behind a URL of fsspec."""

import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from shoal.data import compression
from shoal.errors import UserError, first_line


def store_of(name: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; none and the whole path for a local file."""
    if "://" not in name:
        return None, os.path.abspath(os.path.expanduser(name))
    filesystem, path = fsspec.core.url_to_fs(name)
    protocol = filesystem.protocol
    is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
    return (None, path) if is_local else (filesystem, path)


def open_file(name: str) -> BinaryIO:
    """A file as it lies on a local disk or in a store; raises what the store does."""
    filesystem, path = store_of(name)
    return open(path, "rb") if filesystem is None else filesystem.open(path, "rb")


def tag_of(name: str) -> str | None:
    """What an object store says of the content of a file: none for a local one."""
    filesystem, path = store_of(name)
    info = {} if filesystem is None else filesystem.info(path)
    return info.get("ETag") or info.get("etag")


def archive(name: str) -> zipfile.ZipFile:
    """A zip archive, kept open: reading its directory for each of thousands of members would cost their square."""
    filesystem, path = store_of(name)
    status = os.stat(path) if filesystem is None else None
    mark = (status.st_size, status.st_mtime_ns, status.st_ino) if status else filesystem.ukey(path)
    if _KEPT.key != (name, mark):
        _KEPT.archive, _KEPT.key = compression.archive_in(open_file(name)), (name, mark)
    kept: zipfile.ZipFile = _KEPT.archive
    return kept


class _Kept(threading.local):
    """The archive that a thread read last; threads do not share one, because it counts its readers without a lock."""

    key: object = None
    archive: Any = None


_KEPT = _Kept()


def readable(path: str) -> str:
    """A local path as seen from here, or the URL."""
    here = os.getcwd()
    return os.path.relpath(path) if "://" not in path and Path(path).is_relative_to(here) else path


@contextmanager
def store_errors(asked: str, name: str = "") -> Iterator[None]:
    """Turn what a file system says into one line; the libraries behind the URLs share no base of errors."""
    try:
        yield
    except (UserError, UnicodeDecodeError):
        raise
    except compression.Broken as error:
        found = f"{name} has broken compression ({error})"
        raise UserError(asked, found, "copy or compress the file again") from error
    except OSError as error:
        raise UserError(asked, first_line(error), "check that it is there and may be read") from error
    except Exception as error:
        if "://" not in asked:
            raise
        raise UserError(asked, first_line(error), "check the address, and the access to it") from error
