"""Checkpoints: written aside, hashed, moved into place; nothing in them is ever executed.

checkpoint-500/
  manifest.json                  step, tokens, world size, size and SHA-256 of every file
  model/model.safetensors        parameters and buffers by name (and config.json: a Hugging Face folder)
  optimizer/state.safetensors    "parameter/part", for example "lm_head.weight/exp_avg"
  model/00001.safetensors ...    where a replica is held by several ranks, each writes its own pieces; the file's
  optimizer/00001.safetensors      metadata tells where they belong
  ranks/00001.safetensors        what only this rank holds: "sync/..."; where replicas differ "model/...",
                                   "optimizer/..." and "scaler/..." too
  state.json                     where the run stands
latest, best                     files that hold the name of a checkpoint
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from shoal import manifest, stored
from shoal.errors import ShoalError, UserError
from shoal.layouts.base import Placed
from shoal.optim import LIKE_PARAMETER, NamedState
from shoal.piece import Piece
from shoal.stored import CODES, SCALE, Places, Stored

PARTS = ".parts"
PATIENCE = 120.0  # seconds that rank 0 waits for the parts of the others


Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """Where a run stands: all it takes, beside the tensors, to go on as if it had never stopped."""

    step: Count = 0  # steps done
    tokens: Count = 0  # labels learnt from
    seconds: float = 0.0  # spent in steps, all attempts together
    shares: list[Count] | None = None  # of the ranks, as last balanced
    nonfinite_steps: Count = 0  # in a row
    nonfinite_total: Count = 0
    scaler: dict[str, float] = field(default_factory=dict)  # of the loss, where there is one
    best: float | None = None  # the lowest eval/loss so far
    data: str = ""  # the key of the prepared data
    strategy: str = "allreduce"
    island_size: Count = 1  # ranks that held a replica together
    precision: str = ""
    optimizer: str = ""


Describe = Callable[[Path], None]  # leaves in the folder of the weights what others need to load them
Tensors = dict[str, dict[str, Tensor]]  # file below the checkpoint -> tensors by name


def model_tensors(placed: Placed, *, buffers: bool = True) -> dict[str, Tensor]:
    """This rank's pieces of the parameters, and the buffers that belong to the model's state, by name."""
    params = {piece.name: piece.local.detach() for piece in placed.pieces}
    known = {id(p) for p in placed.model.parameters()}
    state = placed.model.state_dict(keep_vars=True) if buffers else {}
    return params | {name: t for name, t in state.items() if id(t) not in known and name not in params}


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
        self.newest_step = -1  # of those saved by this process
        self.stalled = 0.0  # seconds that the caller has waited in `save` and `settle`
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._written.set()
        self._error: BaseException | None = None

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
        rank 0 gives it whole. They must not change before `settle` returns: they are written as they are, without a
        copy in memory, in a thread beside the next forward and backward pass, which only read parameters.
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

    def settle(self) -> None:
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
        parts = _parts(place, best)
        try:
            for file, held in tensors.items():
                _hand_over(parts / file, held, places)
            self._written.set()
            if self.rank:
                return
            self._receive(parts, [file for file in tensors if Path(file).stem.isdigit()])
            write(place, {}, progress, describe, parts=parts)
            _point(self.folder / "latest", f"checkpoint-{progress.step}")
            if best:
                _point(self.folder / "best", f"checkpoint-{progress.step}")
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
            while not (parts / file).exists():
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
        """Delete all but the newest ones, never the best; and those of later steps, if the run was walked back."""
        _sweep(self.folder)
        best = _pointed(self.folder / "best")
        reached = [path for path in candidates(self.folder) if _step_of(path) <= self.newest_step]
        kept = [path for path in reached if path.name != best][: self.keep or None]
        for path in candidates(self.folder):
            if path not in kept and (path.name != best or path not in reached):
                path.rename(_hidden(path, "old"))  # a kill leaves no half checkpoint under its name
        _sweep(self.folder)


def write(
    folder: Path,
    tensors: Tensors,
    progress: Progress,
    describe: Describe | None,
    *,
    parts: Path | None = None,
) -> None:
    """Write a whole checkpoint aside and move it into place, each file on disk before the move.

    `parts` is a folder of files that are written already, by the ranks that hold what is in them.
    """
    aside = _hidden(folder, "tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if parts is not None and parts.exists():
            parts.rename(aside)
        _fill(aside, tensors, progress, describe)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():  # of an earlier attempt at this step
        shutil.rmtree(_hidden(folder, "old"), ignore_errors=True)
        folder.rename(_hidden(folder, "old"))
    aside.rename(folder)
    _sync_to_disk(folder.parent)
    shutil.rmtree(_hidden(folder, "old"), ignore_errors=True)


def rank_file(folder: str, rank: int) -> str:
    """The file of one rank among several in a folder of a checkpoint."""
    return f"{folder}/{rank:05}.safetensors"


def _hand_over(path: Path, tensors: dict[str, Tensor], places: Places) -> None:
    """Leave a file where rank 0 puts the checkpoint together, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unready = path.with_suffix(".tmp")
    try:
        stored.write(unready, tensors, places)
        unready.rename(path)
    except BaseException:
        unready.unlink(missing_ok=True)
        raise


def _fill(aside: Path, tensors: Tensors, progress: Progress, describe: Describe | None) -> None:
    aside.mkdir(parents=True, exist_ok=True)
    for file, part in tensors.items():
        (aside / file).parent.mkdir(exist_ok=True)
        stored.write(aside / file, part, {})
    if describe is not None:
        describe(aside / "model")
    (aside / "state.json").write_text(json.dumps(asdict(progress), indent=1))
    manifest.write(aside, step=progress.step, tokens=progress.tokens)
    for name in (*manifest.files_in(aside), manifest.NAME, "."):
        _sync_to_disk(aside / name)


def candidates(folder: Path) -> list[Path]:
    """All checkpoints in place below a run folder, newest first."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(steps, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _parts(path: Path, best: bool) -> Path:
    """Where ranks hand over their parts: of each save its own, since a step may be saved again as the best."""
    return path.with_name(f".{path.name}{'.best' if best else ''}{PARTS}")


def _sweep(folder: Path) -> None:
    """Remove what saves, killed or done, have left beside the checkpoints; but no part of the next one."""
    for path in folder.glob(".checkpoint-*"):
        if not path.name.endswith(PARTS):
            shutil.rmtree(path)


def forget_parts(folder: Path) -> None:
    """Remove the parts that ranks of an earlier attempt handed over. Call it before any rank of this one saves."""
    for path in folder.glob(f".checkpoint-*{PARTS}"):
        shutil.rmtree(path)


def _finish_moves(folder: Path) -> None:
    """Move into place what was whole when a kill came just before the move."""
    for aside in folder.glob(".checkpoint-*.tmp"):
        place = folder / aside.name.removeprefix(".").removesuffix(".tmp")
        if not place.exists() and manifest.verify(aside) is None:
            aside.rename(place)


def find(asked: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the newest valid one of `folder` ("latest"), or what a path names.

    None if "latest" was asked and there is no checkpoint at all. Raises UserError if none is valid.
    """
    flag = f"--resume-from-checkpoint {asked}"
    _finish_moves(folder if asked == "latest" else Path(asked))
    if asked != "latest":
        return named(Path(asked), flag, say)
    return newest(candidates(folder), flag, say) if candidates(folder) else None


def named(folder: Path, asked: str, say: Callable[[str], None], *, best: bool = False) -> Path:
    """The checkpoint that a folder is, or of a run's folder the newest valid one, or the best.

    Raises UserError, as an answer to `asked`, if there is none or it is not valid.
    """
    if not folder.is_dir():
        raise UserError(asked, "there is no such folder", "give a checkpoint folder, or a run's")
    if not best and not (folder / manifest.NAME).exists():
        return newest(candidates(folder), asked, say)
    name = _pointed(folder / "best") if best else "."
    if name is None:
        raise UserError(
            asked, "no checkpoint was the best one", "train with --eval-steps, or take the newest"
        )
    if problem := manifest.verify(folder / name):
        raise UserError(asked, problem, "use another checkpoint")
    return folder / name


def newest(choices: Sequence[Path], asked: str, say: Callable[[str], None]) -> Path:
    """The first valid one; those before it are told of. Raises UserError if none is."""
    for path in choices:
        problem = manifest.verify(path)
        if problem is None:
            return path
        say(f"{path} cannot be used: {problem}; trying the one before it")
    raise UserError(asked, "no valid checkpoint was found", "name another folder")


def load_progress(folder: Path) -> Progress:
    """Where the run stood at a checkpoint. Raises UserError where its state.json does not say."""
    try:
        return TypeAdapter(Progress).validate_json((folder / "state.json").read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"read {folder / 'state.json'}", ": ".join(lines[1:3]), stored.ANOTHER) from error


class Parts(Sequence[dict[str, Tensor]]):
    """What ranks that saved held alone, below one heading ("sync", "model", "optimizer"); read when asked for.

    They are those with the `first` place in islands of `every` ranks: all that agreed with each other.
    """

    def __init__(self, folder: Path, heading: str, first: int = 0, every: int = 1) -> None:
        self.files = sorted((folder / "ranks").glob("*.safetensors"))[first::every]
        self.prefix = f"{heading}/"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rank: Any) -> Any:
        with stored.opened(self.files[rank]) as file:
            names = [name for name in file.keys() if name.startswith(self.prefix)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(self.prefix): file.get_tensor(name) for name in names}


def load_model(folder: Path, placed: Placed, part: dict[str, Tensor] | None = None) -> None:
    """Copy a checkpoint's parameters and buffers into a model, however either is cut; refuse those of another model.

    `part` are this rank's own ones, where the replicas differed.
    """
    own = model_tensors(placed)
    asked = f"resume from {folder}"
    if part:
        stored.check(_specs(part), _specs(own), asked)
        for name, tensor in own.items():
            tensor.copy_(part[name])
        return
    saved = Stored(folder / "model")
    places = {piece.name: piece for piece in placed.pieces}
    whole = {name: (piece.local.dtype, tuple(piece.shape)) for name, piece in places.items()}
    stored.check(saved.specs, _specs(own) | whole, asked)
    for name, tensor in own.items():
        if tensor.numel():
            held = places.get(name)
            tensor.copy_(saved.piece(name, held.blocks, tensor.shape) if held else saved.read(name))


def load_optimizer(
    folder: Path, state: NamedState, placed: Placed, part: dict[str, Tensor] | None = None
) -> None:
    """Set the optimizers' state to that of a checkpoint: to `part`, if given. Refuses that of another model."""
    asked = f"resume from {folder}"
    saved = Stored(folder / "optimizer")
    held = {piece.name: piece for piece in placed.pieces}
    by_param: dict[str, list[str]] = {}
    specs = saved.specs if part is None else _specs(part)
    for name, (dtype, shape) in specs.items():
        param, kind = name.rsplit("/", 1)
        by_param.setdefault(param, []).append(name)
        if param not in held:
            raise UserError(asked, f"it holds {name}, of no parameter of the model", stored.ANOTHER)
        wanted = held[param].shape if part is None else held[param].local.shape
        if kind.removesuffix(CODES) in LIKE_PARAMETER and shape != tuple(wanted):
            raise UserError(
                asked, f"{name} has shape {shape}, the model's is {tuple(wanted)}", stored.ANOTHER
            )
        if kind.endswith(CODES):
            _check_scales(asked, name, dtype, shape, specs)

    def read(name: str, piece: Piece) -> Tensor:
        if part is not None:
            return part[name]
        if not saved.shapes[name]:  # a count of steps is not cut
            return saved.read(name)
        if name.endswith(SCALE):
            return _for_each(saved, name, piece)
        return saved.piece(name, piece.blocks, piece.local.shape)

    state.load(
        lambda param: {name.rsplit("/", 1)[1]: read(name, held[param]) for name in by_param.get(param, [])}
    )


def _check_scales(
    asked: str, codes: str, dtype: torch.dtype, shape: stored.Shape, specs: Mapping[str, stored.Spec]
) -> None:
    """Raise UserError where codes are not one byte each, with a scale for every so many along the last dim."""
    scales = specs.get(codes.removesuffix(CODES) + SCALE, (None, ()))[1]
    fit = (
        len(scales) == len(shape) > 0
        and scales[:-1] == shape[:-1]
        and scales[-1]
        and not shape[-1] % scales[-1]
    )
    if dtype != torch.uint8 or not fit:
        found = f"{codes} are {dtype} {shape} with scales {scales}, which do not fit"
        raise UserError(asked, found, stored.ANOTHER)


def _for_each(saved: Stored, name: str, piece: Piece) -> Tensor:
    """For each value of a piece the number that it has in a tensor with one for every so many along the last dim."""
    of_each = piece.shape[-1] // saved.shapes[name][-1]
    found = torch.empty(piece.local.shape)
    for block in piece.blocks:
        (*rows, first), (*sizes, wide) = block.offset, block.size
        begin, end = first // of_each, -(-(first + wide) // of_each)
        numbers = saved.read(name, (*rows, begin), (*sizes, end - begin)).repeat_interleave(of_each, -1)
        found[block.where] = numbers.narrow(-1, first - begin * of_each, wide)
    return found


def load_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    """One file of a checkpoint; empty if it has none."""
    if not (folder / file).exists():
        return {}
    with stored.opened(folder / file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def _specs(tensors: dict[str, Tensor]) -> dict[str, stored.Spec]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _explain(error: BaseException, folder: Path) -> BaseException:
    if isinstance(error, OSError | SafetensorError) and (
        "No space left" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC
    ):
        return UserError(
            f"save a checkpoint in {folder}", "the disk is full", "free some space; the last one is intact"
        )
    if isinstance(error, OSError | SafetensorError):
        return ShoalError(f"save a checkpoint in {folder}: {error}; earlier checkpoints are intact")
    return error


def _point(pointer: Path, name: str) -> None:
    aside = pointer.with_name(f".{pointer.name}.tmp")
    aside.write_text(name + "\n")
    _sync_to_disk(aside)
    aside.replace(pointer)


def _pointed(pointer: Path) -> str | None:
    return pointer.read_text().strip() if pointer.exists() else None


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
