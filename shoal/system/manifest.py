"""What a checkpoint consists of: the size and the SHA-256 of every file, by which it is known to be whole."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FORMAT = 1
THREADS = 8  # that hash: more would not be faster than a disk
NAME = "manifest.json"


def write(folder: Path, *, step: int, tokens: int, run: str = "") -> None:
    """Write down every file that is in `folder`, and the id of the run that it is of."""
    names = files_in(folder)
    hashes = zip(names, hashes_of([folder / name for name in names]), strict=True)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": found} for name, found in hashes}
    manifest = {"format": FORMAT, "run": run, "step": step, "tokens": tokens, "files": files}
    (folder / NAME).write_text(json.dumps(manifest, indent=1))


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None: each file as it was written, and no other."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        found = files_in(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            if name not in found:
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} holds {path.stat().st_size} bytes instead of {expected['bytes']}"
        hashes = hashes_of([folder / name for name in manifest["files"]])
        for (name, expected), hashed in zip(manifest["files"].items(), hashes, strict=True):
            if hashed != expected["sha256"]:
                return f"{name} was altered"
        extra = [name for name in found if name not in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({error})"
    return f"{extra[0]} was not saved with it" if extra else None


def owner(folder: Path) -> str | None:
    """The id of the run whose manifest names every file in `folder`; None where none does. Nothing is hashed.

    Checkpoints of earlier versions carry no id: "".
    """
    try:
        manifest = json.loads((folder / NAME).read_text())
        run, files = manifest.get("run", ""), manifest["files"]
        whole = not folder.is_symlink() and set(files_in(folder)) <= set(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return run if whole and isinstance(run, str) else None


def files_in(folder: Path) -> list[str]:
    """All files of a checkpoint but the manifest, by their path below it."""
    below = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in below if (name := path.relative_to(folder).as_posix()) != NAME)


def hashes_of(paths: Sequence[Path]) -> Iterator[str]:
    """The hashes of files, several read at a time: hashing one takes one core."""
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(sha256, paths)


def sha256(path: Path) -> str:
    """The hash of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
