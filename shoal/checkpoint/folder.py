"""The checkpoints in a run's folder: those in place, those being moved, and `latest` and `best`."""

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.errors import UserError
from shoal.system import manifest
from shoal.system.run_folder import OWN, RunFolder, candidates

PARTS = ".parts"


def find(asked: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the newest valid one of `folder` ("latest"), or what a path names.

    None if "latest" was asked and there is no checkpoint at all. Raises UserError if none is valid.
    """
    flag = f"--resume-from-checkpoint {asked}"
    if asked != "latest":
        return named(Path(asked), flag, say)
    _finish_moves(folder)
    return newest(own(folder), flag, say) if own(folder) else None


def named(folder: Path, asked: str, say: Callable[[str], None], *, best: bool = False) -> Path:
    """The checkpoint that a folder is, or of a run's folder the newest valid one, or the best.

    Raises UserError, as an answer to `asked`, if there is none or it is not valid.
    """
    if not folder.is_dir():
        raise UserError(asked, "there is no such folder", "give a checkpoint folder, or a run's")
    if not best and not (folder / manifest.NAME).exists():
        return newest(own(folder), asked, say)
    name = pointed(folder / "best") if best else "."
    if name is None:
        raise UserError(
            asked, "no checkpoint was the best one", "train with --eval-steps, or take the newest"
        )
    if problem := manifest.verify(folder / name):
        raise UserError(asked, problem, "use another checkpoint")
    return folder / name


def newest(choices: Sequence[Path], asked: str, say: Callable[[str], None]) -> Path:
    """The first valid one; says what is wrong with each one before it. Raises UserError if none is valid."""
    for path in choices:
        problem = manifest.verify(path)
        if problem is None:
            return path
        say(f"{path} cannot be used: {problem}; trying the one before it")
    raise UserError(asked, "no valid checkpoint was found", "name another folder")


def own(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first, but those that are known to be another run's."""
    place = RunFolder(folder)
    return [p for p in candidates(folder) if not place.is_marked or manifest.owner(p) in (None, place.run)]


def hidden(path: Path, suffix: str) -> Path:
    """Where a checkpoint lies while it is moved to its place, or away from it."""
    return path.parent / OWN / f"{path.name}.{suffix}"


def parts_of(path: Path, best: bool) -> Path:
    """The folder where ranks hand over their parts: one a save, since a step may be saved again as the best."""
    return hidden(path, f"best{PARTS}" if best else PARTS.removeprefix("."))


def sweep(folder: Path) -> None:
    """Remove what finished or killed saves left behind, but nothing of the next save."""
    for path in (folder / OWN).glob("checkpoint-*"):
        if not path.name.endswith(PARTS):
            shutil.rmtree(path)


def make_way(place: Path, run: str) -> None:
    """Move away what lies in the place of a checkpoint: aside, if it is of the same run, an earlier attempt at this
    step; else to another name, where it stays."""
    if not os.path.lexists(place):
        return
    if manifest.owner(place) == run:
        shutil.rmtree(hidden(place, "old"), ignore_errors=True)
        place.rename(hidden(place, "old"))
        return
    names = (place.with_name(f"{place.name}.not-of-this-run-{n}") for n in itertools.count(1))
    place.rename(next(name for name in names if not os.path.lexists(name)))


def _finish_moves(folder: Path) -> None:
    """Move into place what was whole when a kill came just before the move."""
    for aside in (folder / OWN).glob("checkpoint-*.tmp"):
        place = folder / aside.name.removesuffix(".tmp")
        if not place.exists() and manifest.verify(aside) is None:
            aside.rename(place)


def point(pointer: Path, name: str) -> None:
    """Point `latest` or `best` to a checkpoint, atomically."""
    aside = hidden(pointer, "tmp")
    aside.parent.mkdir(exist_ok=True)
    aside.write_text(name + "\n")
    sync_to_disk(aside)
    aside.replace(pointer)


def pointed(pointer: Path) -> str | None:
    """The checkpoint that `latest` or `best` names."""
    return pointer.read_text().strip() if pointer.exists() else None


def sync_to_disk(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
