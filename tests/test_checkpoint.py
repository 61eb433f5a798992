"""Checkpoints: whatever happens while one is written, the last good one is found; nothing in them is executed."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.launches import BATCH, shoal
from laws.pool import Pool
from laws.rows import Net
from safetensors import SafetensorError

from shoal import checkpoint
from shoal.checkpoint import Checkpoints, Progress, Tensors, candidates, find, load_tensors
from shoal.errors import BAD_INPUT, ShoalError, UserError
from shoal.layouts.base import whole_model
from shoal.system import manifest
from shoal.system.manifest import verify
from shoal.system.run_folder import OWN
from shoal.tensors import tensor_files

alone = partial(whole_model, loss=lambda model, inputs: model(inputs))
FILES = ("model/model.safetensors", "optimizer/state.safetensors")


def tensors_of(step: int) -> Tensors:
    """What a run holds after `step` steps: tensors that tell the step."""
    return {file: {"a": torch.full((40,), float(step)), "b": torch.arange(3) + step} for file in FILES}


def describe(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(run: Path, step: int, *, keep: int = 2, best: bool = False) -> None:
    checkpoints = Checkpoints(run, every=1, keep=keep)
    checkpoints.save(tensors_of(step), Progress(step=step), describe, best=best)
    checkpoints.finish()


def heard(run: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return find("latest", run, said.append), said


def step_found(run: Path) -> int:
    """The step of the checkpoint that a run would resume from, whose content must be of that step."""
    found, _ = heard(run)
    assert found is not None
    step = checkpoint.load_progress(found).step
    assert found.name == f"checkpoint-{step}"
    for file, expected in tensors_of(step).items():
        loaded = load_tensors(found, file)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    return step


def visible(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name != OWN)


def on_the_way(run: Path) -> list[str]:
    return [path.name for path in (run / OWN).iterdir()]


# Kills


@contextmanager
def dying_at(call: int) -> Iterator[None]:
    """This process dies at the `call`-th call that changes the disk (counted from 0)."""
    calls = 0

    def count() -> None:
        nonlocal calls
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1

    def heard(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            count()

    fsync, stream = os.fsync, tensor_files.stream

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    def torn_stream(path: Path, *args: Any) -> None:
        count()  # before it
        path.write_bytes(b"half a file")
        count()
        stream(path, *args)

    os.fsync, tensor_files.stream = counted_fsync, torn_stream
    sys.addaudithook(heard)
    yield


def die_at_every_call(
    template: Path, run: Path, save_next: Callable[[Path], None], expected: set[int]
) -> list[int]:
    """For every k: copy the run, save in a child that dies at its k-th call, and look what is left."""
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    outcomes = []
    for call in range(1000):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        pid = os.fork()
        if pid == 0:
            with dying_at(call):
                save_next(run)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        done = os.waitstatus_to_exitcode(status) == 0
        step = step_found(run)
        assert step in expected, f"after a kill at call {call} step {step} is found"
        outcomes.append(step)
        save_next(run)  # the next attempt is not disturbed by what was left
        assert step_found(run) == max(expected)
        assert not on_the_way(run), on_the_way(run)
        if done:
            return outcomes
    raise AssertionError("it never got through")


def save_3(run: Path) -> None:
    save(run, 3)


def save_3_best_and_alone(run: Path) -> None:
    save(run, 3, keep=1, best=True)


def save_2_again(run: Path) -> None:
    save(run, 2, keep=1)


@pytest.mark.parametrize(
    ("save_next", "expected"),
    [(save_3, {2, 3}), (save_3_best_and_alone, {2, 3}), (save_2_again, {2})],
)
def test_a_kill_at_any_call_of_a_save_never_loses_the_last_good_one(
    pool: Pool, tmp_path: Path, save_next: Callable[[Path], None], expected: set[int]
) -> None:
    template = tmp_path / "template"
    save(template, 1, best=True)
    save(template, 2)
    outcome = pool.alone(die_at_every_call, template, tmp_path / "run", save_next, expected)
    assert outcome.code == 0, outcome.trace + outcome.output
    steps = outcome.value
    assert len(steps) > 20
    assert steps == sorted(steps), "once it is in place it stays"
    assert set(steps) == expected


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, alter, lengthen, Path.unlink])
@pytest.mark.parametrize("file", [*FILES, "state.json", "model/config.json", "manifest.json"])
def test_a_damaged_one_is_walked_back_over_and_said(
    tmp_path: Path, damage: Callable[[Path], None], file: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-2" / file)
    if verify(tmp_path / "checkpoint-2") is None:
        assert file == "manifest.json"  # a byte of its white space: nothing is lost
        return
    found, said = heard(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    (line,) = said
    assert str(tmp_path / "checkpoint-2") in line
    assert file in line or file == "manifest.json"  # which may now say anything of the others


def test_where_none_is_valid_it_is_said_and_nothing_is_started_anew(tmp_path: Path) -> None:
    save(tmp_path, 1)
    alter(tmp_path / "checkpoint-1" / FILES[0])
    said: list[str] = []
    with pytest.raises(UserError, match="no valid checkpoint was found"):
        find("latest", tmp_path, said.append)
    assert len(said) == 1


def test_where_there_is_none_at_all_there_is_none(tmp_path: Path) -> None:
    assert heard(tmp_path) == (None, [])
    assert heard(tmp_path / "missing") == (None, [])
    with pytest.raises(UserError, match="there is no such folder"):
        find(str(tmp_path / "missing"), tmp_path, print)


def test_a_folder_may_be_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run", step)
    named = str(tmp_path / "run" / "checkpoint-1")
    assert find(named, tmp_path, print) == Path(named)
    assert find(str(tmp_path / "run"), tmp_path, print) == tmp_path / "run" / "checkpoint-2"


# Rotation


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, best=step == 3)
    assert visible(tmp_path) == ["best", "checkpoint-3", "checkpoint-6", "checkpoint-7", "latest"]
    assert (tmp_path / "best").read_text().strip() == "checkpoint-3"
    assert (tmp_path / "latest").read_text().strip() == "checkpoint-7"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_was_walked_back_keeps_what_it_saves(tmp_path: Path, keep: int) -> None:
    """Later checkpoints are damaged, or were not chosen: they do not push out those of the run that goes on."""
    for step in (3, 6, 9):
        save(tmp_path, step, keep=3, best=step == 9)
    alter(tmp_path / "checkpoint-9" / FILES[0])
    save(tmp_path, 4, keep=keep)
    assert step_found(tmp_path) == 4
    save(tmp_path, 5, keep=keep)
    assert step_found(tmp_path) == 5
    assert [path.name for path in candidates(tmp_path)] == ["checkpoint-5", "checkpoint-4"][:keep]


def test_only_what_a_manifest_of_this_run_vouches_for_is_removed(tmp_path: Path) -> None:
    """A checkpoint of another run, one with a note in it, a folder without a manifest, and a hidden one."""
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    foreign = Checkpoints(tmp_path, every=1, keep=9)
    foreign.run = "another"
    for run, step in ((foreign, 1), (checkpoints, 2)):
        run.save(tensors_of(step), Progress(step=step), None)
        run.finish()
    notes = [tmp_path / name for name in ("checkpoint-2/note", "checkpoint-4/mine", ".checkpoint-9.tmp/mine")]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
    for step in (3, 4, 5):
        checkpoints.save(tensors_of(step), Progress(step=step), None)
        checkpoints.finish()
    notes[1] = tmp_path / "checkpoint-4.not-of-this-run-1" / "mine"
    assert all(note.read_text() == "mine" for note in notes)
    left = ["checkpoint-1", "checkpoint-2", "checkpoint-4.not-of-this-run-1", "checkpoint-5", "latest"]
    assert visible(tmp_path) == [".checkpoint-9.tmp", *left]
    assert verify(tmp_path / "checkpoint-1") is None


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    """The copy is made beside the loop; once `wait_until_read` has returned the live tensors may change."""
    live = tensors_of(1)
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    checkpoints.save(live, Progress(step=1), None)
    checkpoints.wait_until_read()
    for part in live.values():
        for tensor in part.values():
            tensor.fill_(-1)
    checkpoints.finish()
    assert step_found(tmp_path) == 1


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize(
    "place", ["tensors.tensor_files.stream", "checkpoint.saving.sync_to_disk", "system.manifest.sha256"]
)
def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"shoal.{place}", full)
    with pytest.raises(ShoalError, match="the disk is full") as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert step_found(tmp_path) == 1
    assert visible(tmp_path) == ["checkpoint-1", "latest"]


def test_another_failure_to_write_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tensor_files, "stream", refused)
    with pytest.raises(ShoalError, match=r"save a checkpoint in .*: Permission denied; change"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert step_found(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def save_until_full(run: Path) -> int:
    """The last step that could be saved."""
    for step in range(1, 20):
        try:
            save(run, step, keep=20)
        except ShoalError as full:
            if "the disk is full" not in str(full):
                raise
            return step - 1
    return 19


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(60_000))
    saved = save_until_full(small_disk)
    assert 1 < saved < 19
    assert step_found(small_disk) == saved
    (small_disk / "ballast").unlink()
    save(small_disk, saved + 1, keep=2)
    assert step_found(small_disk) == saved + 1


def test_room_for_two_checkpoints_is_looked_for_before_the_first_step(
    pool: Pool, data: list[str], small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(150_000))
    run = small_disk / "run"
    refused = pool.alone(shoal, ["train", *data, *BATCH, "--max-steps", "2", "--output-dir", str(run)])
    assert refused.code == BAD_INPUT, refused.output
    line = refused.output.splitlines()[-1]
    assert line.startswith(f"shoal: error: --output-dir {run}: two checkpoints take 0.000174 GB, ")
    assert not list(run.glob("checkpoint-*"))


# Models


def test_a_model_comes_back_and_what_is_tied_is_saved_once(tmp_path: Path) -> None:
    model, other = Net("tied", 0.0), Net("tied", 0.0)
    tensors = checkpoint.model_tensors(alone(model))
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    checkpoint.write(tmp_path / "checkpoint-1", {FILES[0]: tensors}, Progress(step=1), None)
    with torch.no_grad():
        checkpoint.load_model(tmp_path / "checkpoint-1", alone(other))
    assert other.head.weight is other.embed.weight
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kind", "found"), [("unused", "no tensor unused"), ("tied", "a tensor head.weight")]
)
def test_another_model_is_refused(tmp_path: Path, kind: str, found: str) -> None:
    tensors = {FILES[0]: checkpoint.model_tensors(alone(Net("plain", 0.0)))}
    checkpoint.write(tmp_path / "checkpoint-1", tensors, Progress(step=1), None)
    other = Net(kind, 0.0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=found):
        checkpoint.load_model(tmp_path / "checkpoint-1", alone(other))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = checkpoint.model_tensors(alone(Net("plain", 0.0)))
    tensors["up.bias"] = torch.zeros(7)
    checkpoint.write(tmp_path / "checkpoint-1", {FILES[0]: tensors}, Progress(step=1), None)
    with pytest.raises(UserError, match=r"up\.bias has shape"):
        checkpoint.load_model(tmp_path / "checkpoint-1", alone(Net("plain", 0.0)))


# Pickle


class Poison:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_nothing_unpickles(tmp_path: Path) -> None:
    """Pickles under every name that others read, and in the place of every file, with the right checksum."""
    mark = tmp_path / "executed"
    poison = pickle.dumps(Poison(mark))
    run = tmp_path / "run"
    save(run, 1)
    names = ("optimizer/state.pt", "optimizer.pt", "model/pytorch_model.bin", "rng_state.pth", "state.pkl")
    for name in names:
        (run / "checkpoint-1" / name).write_bytes(poison)
    manifest.write(run / "checkpoint-1", step=1, tokens=0)
    assert step_found(run) == 1
    assert not mark.exists()

    for file in FILES:
        forged = tmp_path / "forged" / "checkpoint-1"
        shutil.rmtree(forged.parent, ignore_errors=True)
        shutil.copytree(run / "checkpoint-1", forged)
        (forged / file).write_bytes(poison)
        manifest.write(forged, step=1, tokens=0)
        assert verify(forged) is None
        with pytest.raises(UserError, match="use another checkpoint"):
            load_tensors(forged, file)
        assert not mark.exists()
    pickle.loads(poison)
    assert mark.exists(), "the poison works"
