"""The corpus that every machine has: the running Python's own documentation and source text."""

import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from shoal.errors import UserError

NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
MACHINE_MADE = ("_sysconfigdata", "sitecustomize")  # differ from one build of the same Python to the next


def documentation_file() -> Path:
    """The module that holds the texts of Python's `help()`."""
    return _standard_library() / "pydoc_data" / "topics.py"


def source_files() -> list[Path]:
    """Every source file of the standard library but tests, empty and machine-made ones, in path order."""
    root = _standard_library()
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_SOURCE and "config-" not in name]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(
        (
            file
            for file in found
            if file != documentation_file()
            and not file.name.startswith(MACHINE_MADE)
            and file.stat().st_size > 0
        ),
        key=lambda file: file.relative_to(root).as_posix(),
    )


def topics() -> Iterator[str]:
    """The texts of Python's `help()`, in the order of their names."""
    from pydoc_data.topics import topics as texts  # half a megabyte of literals: only when asked for

    for name in sorted(texts):
        yield texts[name]


@cache  # looked up once a file it took a third of a second
def _standard_library() -> Path:
    folder = Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise UserError("--data builtin", f"this Python has no folder {folder}", "name text of your own")
    return folder
