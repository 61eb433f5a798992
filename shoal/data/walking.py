"""Folders and patterns on a local disk: every file once, and a count of what is left out."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

MAGIC = "*?["
NOT_READ = (".", "_")  # what begins so is a tool's own: .git, __MACOSX, _SUCCESS
HIDDEN = "hidden (. or _)"  # as it is counted among what is left out


@dataclass(frozen=True)
class Found:
    """A file or folder, links followed."""

    path: str
    is_folder: bool
    is_file: bool
    size: int


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out of a folder."""
    return name.startswith(NOT_READ)


def files_below(folder: str, left_out: Counter[str]) -> list[Found]:
    """Every file below a folder, by name; linked folders are followed, and each folder is read once.

    Raises OSError for what cannot be listed, and for a link to nothing.
    """
    files = [found for _, files in _walk(folder, left_out) for found in files]
    return sorted(files, key=lambda found: found.path)


def matches(pattern: str, left_out: Counter[str]) -> list[Found]:
    """The files and folders that a pattern names, by name; `**` stands for any folders. Raises OSError as above."""
    found = {path: look_at(path) for path in _expand("", list(Path(pattern).parts), left_out)}
    return [found[path] for path in sorted(found)]


def _walk(folder: str, left_out: Counter[str]) -> Iterator[tuple[str, list[Found]]]:
    """Each folder from `folder` on, with its files."""
    folders, seen = [folder], {os.path.realpath(folder)}
    while folders:
        folder, files = folders.pop(), []
        for found in _listed(folder, left_out):
            if found.is_file:
                files.append(found)
            elif not found.is_folder:
                left_out["neither file nor folder"] += 1
            elif (real := os.path.realpath(found.path)) in seen:
                left_out["link to a folder that is read already"] += 1
            else:
                seen.add(real)
                folders.append(found.path)
        yield folder, files


def _listed(folder: str, left_out: Counter[str]) -> list[Found]:
    names = sorted(os.listdir(folder))
    left_out[HIDDEN] += sum(map(is_hidden, names))
    return [look_at(os.path.join(folder, name)) for name in names if not is_hidden(name)]


def look_at(path: str) -> Found:
    """A file or folder; raises OSError for what is not there or may not be seen."""
    status = os.stat(path)
    return Found(path, stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode), status.st_size)


def _expand(base: str, steps: list[str], left_out: Counter[str]) -> Iterator[str]:
    if not steps:
        yield base
        return
    step, rest = steps[0], steps[1:]
    if step == "**":
        for folder, files in _walk(base or os.curdir, left_out):
            yield from _expand(folder, rest, left_out) if rest else (found.path for found in files)
    elif not any(sign in step for sign in MAGIC):
        if os.path.lexists(path := os.path.join(base, step)):
            yield from _expand(path, rest, left_out)
    elif os.path.isdir(base or os.curdir):
        for name in os.listdir(base or os.curdir):
            if fnmatchcase(name, step) and (step.startswith(".") or not name.startswith(".")):
                yield from _expand(os.path.join(base, name), rest, left_out)
