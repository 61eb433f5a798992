"""Writes checkpoints beside the training that goes on: aside, hashed, then moved into place."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Container
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from shoal.checkpoint.folder import (
    hidden,
    make_way,
    parts_of,
    point,
    pointed,
    sweep,
    sync_to_disk,
)
from shoal.checkpoint.progress import Progress
from shoal.errors import ShoalError, foreseen
from shoal.system import manifest
from shoal.system.run_folder import candidates, step_of, to_go_on
from shoal.tensors import tensor_files
from shoal.tensors.tensor_files import Places

PATIENCE = 120.0  # seconds that rank 0 waits for the part of another, of which nothing more is written
Describe = Callable[[Path], None]  # leaves in the folder of the weights what others need to load them
Tensors = dict[str, dict[str, Tensor]]  # file below the checkpoint -> tensors by name


class Checkpoints:
    """The checkpoints of one run folder. Rank 0 writes, the others hand it their part; every rank reads."""

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int,
        rank: int = 0,
        world_size: int = 1,
        island_size: int = 1,
        present: Callable[[], Container[int]] | None = None,
    ) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.rank = rank
        self.world_size = world_size
        self.island_size = island_size  # the first ranks, which together hold the first replica
        self.present = present or (lambda: range(world_size))  # the replicas that still hand over parts
        self.run = ""  # the id of the run, by which manifests vouch for what may be removed
        self.newest_step = -1  # of those saved by this process
        self.stalled = 0.0  # seconds that the caller has waited in `save` and `wait_until_read`
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._written.set()
        self._error: BaseException | None = None

    def belong_to(self, run: str) -> None:
        """Name the run in the manifests: only what a run made is ever removed."""
        self.run = run

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps."""
        return bool(self.every) and step % self.every == 0

    def save(
        self,
        tensors: Tensors,
        progress: Progress,
        describe: Describe | None,
        *,
        part: dict[str, Tensor] | None = None,
        places: Places | None = None,
        best: bool = False,
    ) -> None:
        """Start to save live tensors: those of the model, and this rank's `part` (if one has any, all have).

        Where a replica is held by several ranks each of them gives its pieces of the model, and their `places`; else
        rank 0 gives it whole. They must not change before `wait_until_read` returns: they are written as they are,
        without a copy in memory, in a thread beside the next forward and backward pass, which only read parameters.
        """
        began = time.perf_counter()
        self.finish()
        self.newest_step = progress.step
        files = tensors | ({rank_file("ranks", self.rank): part} if part else {})
        if self.rank and not files:
            return
        self._written.clear()
        args = (files, places or {}, Progress(**asdict(progress)), describe, best)
        self._thread = threading.Thread(target=self._save, args=args, name="checkpoint")
        self._thread.start()
        self.stalled += time.perf_counter() - began

    def wait_until_read(self) -> None:
        """Wait until what this rank saves is in its files; call before parameters change."""
        began = time.perf_counter()
        self._written.wait()
        self.stalled += time.perf_counter() - began
        if self._error is not None:
            self.finish()

    def finish(self) -> None:
        """Wait until the save is in place; raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(
        self, tensors: Tensors, places: Places, progress: Progress, describe: Describe | None, best: bool
    ) -> None:
        place = self.folder / f"checkpoint-{progress.step}"
        parts = parts_of(place, best)
        try:
            for file, held in tensors.items():
                _hand_over(parts / file, held, places)
            self._written.set()
            if self.rank:
                return
            self._receive(parts, [file for file in tensors if Path(file).stem.isdigit()])
            write(place, {}, progress, describe, parts=parts, run=self.run)
            point(self.folder / "latest", f"checkpoint-{progress.step}")
            if best:
                point(self.folder / "best", f"checkpoint-{progress.step}")
            self._rotate()
        except BaseException as error:  # handed to the loop, which raises it
            self._error = _explain(error, self.folder)
            if self.world_size == 1:  # else others are writing there
                shutil.rmtree(parts, ignore_errors=True)
        finally:
            self._written.set()

    def _receive(self, parts: Path, own: list[str]) -> None:
        """Wait for the files of the other ranks, `own` being those of rank 0. All it takes is a disk that all see.

        Where a rank is gone what each held alone is left out: who goes on from here starts from the one model.
        """
        deadline, all_here = time.monotonic() + PATIENCE, True
        holders = {"ranks": self.world_size, "model": self.island_size, "optimizer": self.island_size}
        folders = [Path(file).parent.name for file in own]
        awaited = [(rank_file(each, rank), rank) for each in folders for rank in range(1, holders[each])]
        for file, rank in awaited:
            written = 0
            while not (parts / file).exists():
                if (size := _size(unready(parts / file))) != written:
                    written, deadline = size, time.monotonic() + PATIENCE
                if rank // self.island_size not in self.present():
                    all_here = False
                    break
                if time.monotonic() > deadline:
                    raise ShoalError(
                        f"save in {self.folder}: the part of rank {rank} did not come; is it a disk that all see?"
                    )
                time.sleep(0.01)
        if not all_here:
            shutil.rmtree(parts / "ranks", ignore_errors=True)  # only now: others were still writing there

    def _rotate(self) -> None:
        """Delete all but the newest ones, never the best; and those of later steps, if the run was walked back.

        Only what a manifest of this run vouches for: with a file more in it, a checkpoint stays.
        """
        sweep(self.folder)
        best = pointed(self.folder / "best")
        own = [path for path in candidates(self.folder) if manifest.owner(path) == self.run]
        reached = [path for path in own if step_of(path) <= self.newest_step]
        kept = [path for path in reached if path.name != best][: self.keep or None]
        for path in own:
            if path not in kept and (path.name != best or path not in reached):
                path.rename(hidden(path, "old"))  # a kill leaves no half checkpoint under its name
        sweep(self.folder)


def write(
    folder: Path,
    tensors: Tensors,
    progress: Progress,
    describe: Describe | None,
    *,
    parts: Path | None = None,
    run: str = "",
) -> None:
    """Write a whole checkpoint aside and move it into place, each file on disk before the move.

    `parts` is a folder of files that are written already, by the ranks that hold what is in them. What lies in its
    place is removed if a manifest of the same run vouches for it, else renamed.
    """
    aside = hidden(folder, "tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        if parts is not None and parts.exists():
            parts.rename(aside)
        _fill(aside, tensors, progress, describe, run)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    make_way(folder, run)
    aside.rename(folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(hidden(folder, "old"), ignore_errors=True)


def rank_file(folder: str, rank: int) -> str:
    """The file of one rank among several in a folder of a checkpoint."""
    return f"{folder}/{rank:05}.safetensors"


def _hand_over(path: Path, tensors: dict[str, Tensor], places: Places) -> None:
    """Write a file to where rank 0 assembles the checkpoint, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = unready(path)
    try:
        tensor_files.write(aside, tensors, places)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def unready(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_suffix(".tmp")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fill(aside: Path, tensors: Tensors, progress: Progress, describe: Describe | None, run: str) -> None:
    aside.mkdir(parents=True, exist_ok=True)
    for file, part in tensors.items():
        (aside / file).parent.mkdir(exist_ok=True)
        tensor_files.write(aside / file, part, {})
    if describe is not None:
        describe(aside / "model")
    (aside / "state.json").write_text(json.dumps(asdict(progress), indent=1))
    manifest.write(aside, step=progress.step, tokens=progress.tokens, run=run)
    for name in (*manifest.files_in(aside), manifest.NAME, "."):
        sync_to_disk(aside / name)


def _explain(error: BaseException, folder: Path) -> BaseException:
    if line := foreseen(error, f"save a checkpoint in {folder}", to_go_on(folder)):
        return line
    if isinstance(error, OSError | SafetensorError):
        return ShoalError(f"save a checkpoint in {folder}: {error}; {to_go_on(folder)}")
    return error
