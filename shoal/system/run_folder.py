"""A run's folder: which files shoal made, so that no other is removed, and which run writes there.

.shoal/run.json      the marker: format, the run's id, and the files that the run makes, named before it makes them
.shoal/lock          held by rank 0 as long as the run lasts
.shoal/...           files and folders that are not in their place yet
"""

import glob
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shoal.errors import ShoalError, UserError
from shoal.system import manifest
from shoal.system.locks import Answer, Lock

OWN = ".shoal"
MARKER = "run.json"
FORMAT = 1
CONFIG, ENVIRONMENT, SUMMARY = "config.resolved.yaml", "environment.json", "summary.json"
FILES = (CONFIG, ENVIRONMENT, "metrics.jsonl", SUMMARY, "latest", "best")
FOLDERS = ("final", "ledger", "errors", "tb")
PATIENCE = 1.0  # seconds; a process that asks whether the lock is held takes it for a moment


@dataclass
class Marker:
    """What `.shoal/run.json` says. `made` are paths below the folder, or glob patterns that hold the run's id.

    A run that an earlier version began has no id, as its checkpoints have none.
    """

    run: str
    made: list[str] = field(default_factory=list)
    format: int = FORMAT


class RunFolder:
    """The folder of one run. Only rank 0 calls what changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.own = path / OWN
        self.lock = Lock(self.own / "lock")
        self.holds = False

    @property
    def run(self) -> str:
        """The id of the run that the folder is of."""
        marker = self._marker()
        return marker.run if marker else ""

    @property
    def is_marked(self) -> bool:
        """Whether it is the folder of a run."""
        return (self.own / MARKER).is_file()

    def check(self, *, anew: bool, overwrite: bool = False) -> None:
        """Raise UserError where a run may not begin `anew` here, or go on; nothing is changed.

        Only a folder that is new, empty or marked is written into; one of an earlier version's run to go on there.
        """
        asked = f"--output-dir {self.path}"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(asked, "it is a file", "name a folder")
        if not self._entries():
            return
        if self.lock.is_busy() and not self.holds:
            raise self._busy()
        marker = self._marker()
        if marker is None:
            self._check_unmarked(asked, anew)
        elif anew and not overwrite and (found := self._results()):
            raise UserError(asked, found, "name another one, or add --overwrite-output-dir")

    def hold(self, say: Callable[[str], None]) -> None:
        """Keep other runs out until this process ends. Raises UserError if one is in, or nothing can be written."""
        if self.holds:
            return
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            answer = self.lock.take(PATIENCE)
            if answer is Answer.BUSY:
                raise self._busy()
            self.lock.write(f"process {os.getpid()} on {platform.node()}")
        except OSError as error:
            raise UserError(f"--output-dir {self.path}", str(error.strerror), "name another one") from error
        if answer is Answer.NO_LOCKS:
            say(f"{self.path}: {answer.value}; make sure that no other run writes there")
        self.holds = True

    def begin(self, *, anew: bool, overwrite: bool, ranks: int, say: Callable[[str], None]) -> str:
        """Make the folder this run's, and return the run's id. If it begins anew, remove what an earlier run made.

        Raises UserError, before anything is changed, where that cannot be or something else is in the way.
        """
        self.check(anew=anew, overwrite=overwrite)
        self.hold(say)
        self.check(anew=anew, overwrite=overwrite)  # what was so before the lock may no longer be
        marker = self._marker() or self._adopted()
        new = Marker(secrets.token_hex(8)) if anew or not self._entries() else marker
        makes = _made_by(new.run, ranks)
        self._check_way(marker, makes, anew)
        if anew:
            self._remove(marker)
        for path in self.own.iterdir():  # left by a kill
            if path.name.startswith(("final.", "checkpoint-")) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        new.made += [name for name in makes if name not in new.made]
        self._write(new)
        return new.run

    def aside(self, name: str) -> Path:
        """The path, where nothing is yet, at which to make the folder that `put` then moves to `name`."""
        path = self.own / f"{name}.new"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def put(self, aside: Path, name: str) -> None:
        """Move a folder made in `.shoal/` to `name`, in place of what this run put there before.

        Raises ShoalError where somebody else has put something there: it stays, and so does the one aside.
        """
        marker, target, old = self._required_marker(), self.path / name, self.own / f"{name}.old"
        if other := self._others(target, marker.made):
            raise ShoalError(f"{other} was not made by this run, and stays; what belongs there is in {aside}")
        files = (path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
        names = {glob.escape(f"{name}/{file.as_posix()}") for file in files}
        marker.made += sorted(names - set(marker.made))
        self._write(marker)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def keep_error(self, rank: int, text: str) -> None:
        """Write the error that ended the run into its folder, unless another process writes there."""
        name = f"errors/{error_file(rank)}"
        with suppress(OSError, UserError):
            if not self.is_marked or self.lock.take() is Answer.BUSY:
                return
            try:
                marker = self._required_marker()
                if self._others(self.path / name, marker.made) is None:
                    marker.made += [name] if name not in marker.made else []
                    self._write(marker)
                    (self.path / name).parent.mkdir(exist_ok=True)
                    (self.path / name).write_text(text)
            finally:
                self.lock.release()

    def _entries(self) -> list[str]:
        """The names in it, without a `.shoal` that has no marker: a run that was refused left that."""
        try:
            found = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise UserError(f"--output-dir {self.path}", str(error.strerror), "name another one") from error
        return [name for name in found if name != OWN or self.is_marked]

    def _results(self) -> str:
        if (self.path / SUMMARY).exists():
            return "it holds a finished run"
        if candidates(self.path):
            return "it holds an unfinished run (go on with --resume-from-checkpoint latest)"
        return ""

    def _check_unmarked(self, asked: str, anew: bool) -> None:
        if not self._is_of_earlier_version():
            entries = self._entries()
            found = f"it holds {entries[0]}" + (f" and {len(entries) - 1} more" if entries[1:] else "")
            raise UserError(asked, f"{found}, and no run of shoal", "name a new or an empty folder")
        if anew:
            found = "it holds a run of an earlier version, which did not record its files"
            raise UserError(
                asked,
                found,
                "remove it yourself, name another, or go on with --resume-from-checkpoint latest",
            )

    def _is_of_earlier_version(self) -> bool:
        saved = (manifest.owner(path) for path in candidates(self.path))
        return (self.path / CONFIG).is_file() and any(run is not None for run in saved)

    def _adopted(self) -> Marker:
        """The marker of a run that an earlier version began: what it has made until now."""
        finished = (self.path / SUMMARY).is_file()
        folders = [name for name in FOLDERS if finished or name != "final"]
        found = [path for name in folders for path in (self.path / name).rglob("*") if path.is_file()]
        made = [glob.escape(path.relative_to(self.path).as_posix()) for path in found]
        return Marker("", [*FILES, *made] if self._is_of_earlier_version() else [])

    def _check_way(self, marker: Marker, makes: Iterable[str], anew: bool) -> None:
        """Refuse what lies where this run is to write, and was not made by it or the one before."""
        places = [self.path / name for name in ("final", *makes)]
        others = [other for place in places if (other := self._others(place, marker.made))]
        if anew:
            others += [path for path in candidates(self.path) if manifest.owner(path) != marker.run]
        for other in others:
            found = f"{other} is not as a run of shoal has made it"
            raise UserError(f"--output-dir {self.path}", found, "move it elsewhere")

    def _others(self, place: Path, made: Iterable[str]) -> Path | None:
        """What is at `place`, or below it, and is not among what was `made`; None if there is nothing."""
        if not os.path.lexists(place):
            return None
        if place.is_symlink() or place.is_file():
            files = [place]
        else:
            files = [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
        known = self._found(made)
        return next((path for path in files if path not in known), None)

    def _found(self, made: Iterable[str]) -> set[Path]:
        return {path for pattern in made for path in self.path.glob(pattern)}

    def _remove(self, marker: Marker) -> None:
        """Remove what a run has made, file by file, and the folders that are empty then."""
        for path in candidates(self.path):
            aside = self.own / f"{path.name}.old"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)  # a kill leaves no half checkpoint under its name
        for path in self._found(marker.made):
            if path.parent.resolve().is_relative_to(self.path.resolve()) and not path.is_dir():
                path.unlink()
        for name in FOLDERS:
            below = [path for path in (self.path / name).rglob("*") if path.is_dir()]
            for folder in (*sorted(below, reverse=True), self.path / name):
                with suppress(OSError):  # it holds what others have made
                    folder.rmdir()

    def _marker(self) -> Marker | None:
        path = self.own / MARKER
        if not path.is_file():
            return None
        try:
            marker = Marker(**json.loads(path.read_text()))
            if marker.format != FORMAT:
                raise ValueError(f"its format is {marker.format}, this version reads {FORMAT}")
            if any(Path(name).is_absolute() or ".." in Path(name).parts for name in marker.made):
                raise ValueError("it names files elsewhere")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--output-dir {self.path}", f"{path}: {error}", "name another folder") from error
        return marker

    def _required_marker(self) -> Marker:
        marker = self._marker()
        assert marker is not None, "the run has begun"
        return marker

    def _write(self, marker: Marker) -> None:
        aside = self.own / f"{MARKER}.tmp"
        aside.write_text(json.dumps(asdict(marker), indent=1))
        aside.replace(self.own / MARKER)

    def _busy(self) -> UserError:
        found = f"another run is writing there ({self.lock.note() or 'unknown'})"
        return UserError(f"--output-dir {self.path}", found, "let it end, or name another folder")


def candidates(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint below a run's folder, newest first."""
    steps = [
        path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(steps, key=step_of, reverse=True)


def to_go_on(folder: Path) -> str:
    """What a user whose run has ended early does next: the newest checkpoint, and how to go on from it."""
    saved = candidates(folder)
    if not saved:
        return "there is no checkpoint yet"
    return f"go on from {saved[0]} with --resume-from-checkpoint latest"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("checkpoint-"))


def error_file(rank: int) -> str:
    """The file in `errors/` of the error of a rank."""
    return f"rank-{rank}.json"


def ledger_file(rank: int) -> str:
    """The file in `ledger/` of a rank."""
    return f"rank-{rank:05d}.jsonl"


def _made_by(run: str, ranks: int) -> list[str]:
    """The files that a run on `ranks` ranks makes, but checkpoints (see their manifests) and `final` (see `put`)."""
    ledger = ["run.json", *map(ledger_file, range(ranks))]
    return [
        *FILES,
        *(f"ledger/{name}" for name in ledger),
        *(f"errors/{error_file(rank)}" for rank in range(ranks)),
        f"tb/events.out.tfevents.*{run}",
    ]
