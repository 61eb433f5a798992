"""A run's folder: only a marked one is written into, only what a run made is removed, one run writes at a time."""

import errno
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config import CheckpointConfig
from shoal.errors import ShoalError, UserError
from shoal.system import manifest
from shoal.system.locks import Answer, Lock
from shoal.system.run_folder import RunFolder

Content = dict[str, str]


def content(folder: Path) -> Content:
    """All files below it but those of `.shoal/`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_text() for name, path in names.items() if not name.startswith(".shoal/")}


def fill(folder: Path, *names: str, text: str = "mine") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def begin(
    folder: Path, *, anew: bool = True, overwrite: bool = False, ranks: int = 2
) -> tuple[RunFolder, str]:
    place = RunFolder(folder)
    run = place.begin(anew=anew, overwrite=overwrite, ranks=ranks, say=lambda line: None)
    return place, run


def checkpoint(folder: Path, step: int, run: str) -> None:
    fill(folder / f"checkpoint-{step}", "model/weights", "state.json", text=str(step))
    manifest.write(folder / f"checkpoint-{step}", step=step, tokens=0, run=run)


def put_final(place: RunFolder, text: str) -> None:
    aside = place.aside("final")
    fill(aside, "model", text=text)
    place.put(aside, "final")


def run_to_its_end(folder: Path, **how: Any) -> str:
    """All that a run leaves."""
    place, run = begin(folder, **how)
    made = ["config.resolved.yaml", "metrics.jsonl", "latest", "ledger/run.json", "ledger/rank-00001.jsonl"]
    fill(folder, *made, f"tb/events.out.tfevents.1.host.2.0.{run}", text=run)
    checkpoint(folder, 5, run)
    put_final(place, run)
    fill(folder, "summary.json", text=run)
    place.lock.release()
    return run


@pytest.mark.parametrize(
    "names", [["final/model"], ["notes.txt"], ["errors/x", "tb/y"], ["checkpoint-5/model"]]
)
@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_no_run_has_marked_is_refused_and_stays(
    tmp_path: Path, names: list[str], anew: bool, overwrite: bool
) -> None:
    fill(tmp_path, *names)
    before = content(tmp_path)
    with pytest.raises(UserError, match="and no run of shoal; name a new or an empty folder"):
        begin(tmp_path, anew=anew, overwrite=overwrite)
    assert content(tmp_path) == before
    assert not (tmp_path / ".shoal").exists()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("anew", [True, False])
def test_an_empty_folder_and_one_that_is_not_there_are_fine(tmp_path: Path, exists: bool, anew: bool) -> None:
    folder = tmp_path if exists else tmp_path / "a" / "b"
    place, run = begin(folder, anew=anew)
    assert place.is_marked
    assert place.run == run != ""


def test_begun_anew_all_that_a_run_made_is_removed_and_nothing_else(tmp_path: Path) -> None:
    first = run_to_its_end(tmp_path)
    others = ["README", "ledger/note", "tb/events.out.tfevents.of-another", "src/final/a", "checkpoint-note"]
    fill(tmp_path, *others, ".shoal/notes/a")
    with pytest.raises(UserError, match="it holds a finished run"):
        begin(tmp_path)
    _, second = begin(tmp_path, overwrite=True)
    assert first != second
    assert content(tmp_path) == dict.fromkeys(sorted(others), "mine")
    assert not (tmp_path / "final").exists()
    assert (tmp_path / ".shoal/notes/a").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["final/notes", "checkpoint-5/notes", "checkpoint-6/model", "ledger/rank-00003.jsonl"]
)
def test_what_is_in_the_way_is_refused_before_anything_is_removed(tmp_path: Path, name: str) -> None:
    run_to_its_end(tmp_path)
    fill(tmp_path, name)
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.*move it elsewhere"):
        begin(tmp_path, overwrite=True, ranks=4)
    assert content(tmp_path) == before


def test_a_checkpoint_of_another_run_is_in_the_way_of_a_new_one(tmp_path: Path) -> None:
    run_to_its_end(tmp_path)
    checkpoint(tmp_path, 9, "another")
    with pytest.raises(UserError, match="checkpoint-9"):
        begin(tmp_path, overwrite=True)
    begin(tmp_path, anew=False)


def test_a_run_that_goes_on_keeps_all(tmp_path: Path) -> None:
    run = run_to_its_end(tmp_path)
    before = content(tmp_path)
    assert begin(tmp_path, anew=False)[1] == run
    assert content(tmp_path) == before


def test_a_final_that_somebody_else_put_there_is_never_replaced(tmp_path: Path) -> None:
    place, _ = begin(tmp_path)
    fill(tmp_path, "final/mine")
    with pytest.raises(ShoalError, match="final/mine was not made by this run, and stays"):
        put_final(place, "ours")
    assert content(tmp_path) == {"final/mine": "mine"}
    assert (place.own / "final.new" / "model").exists()


def of_earlier_version(folder: Path) -> None:
    fill(
        folder,
        "config.resolved.yaml",
        "metrics.jsonl",
        "ledger/rank-00000.jsonl",
        "final/model",
        "summary.json",
    )
    checkpoint(folder, 5, "")


def test_a_run_of_an_earlier_version_goes_on_and_is_not_written_over(tmp_path: Path) -> None:
    of_earlier_version(tmp_path)
    before = content(tmp_path)
    for overwrite in (True, False):
        with pytest.raises(UserError, match="a run of an earlier version"):
            begin(tmp_path, overwrite=overwrite)
    place, run = begin(tmp_path, anew=False)
    assert run == ""
    assert content(tmp_path) == before
    put_final(place, "newer")
    assert content(tmp_path)["final/model"] == "newer"
    place.lock.release()
    begin(tmp_path, overwrite=True)
    assert content(tmp_path) == {}


def elsewhere(marker: dict[str, Any]) -> None:
    marker["made"].append("../precious")


def newer(marker: dict[str, Any]) -> None:
    marker["format"] = 9


@pytest.mark.parametrize("change", [elsewhere, newer, dict.clear])
def test_a_marker_that_makes_no_sense_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = tmp_path / "run"
    run_to_its_end(folder)
    fill(tmp_path, "precious")
    path = folder / ".shoal" / "run.json"
    marker = json.loads(path.read_text())
    change(marker)
    path.write_text(json.dumps(marker))
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"run\.json"):
        begin(folder, overwrite=True)
    assert content(tmp_path) == before


def test_an_error_is_kept_in_the_folder_of_a_run_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path / "nothing").keep_error(0, "text")
    assert not (tmp_path / "nothing").exists()
    run_to_its_end(tmp_path / "run")
    RunFolder(tmp_path / "run").keep_error(7, "text")
    assert content(tmp_path / "run")["errors/rank-7.json"] == "text"
    begin(tmp_path / "run", overwrite=True)
    assert content(tmp_path / "run") == {}


@pytest.mark.parametrize(
    ("resumed", "anew"),
    [("", True), ("latest", False), ("run", False), ("run/checkpoint-5", False), ("x/../run/checkpoint-5", False),
     ("other", True), ("other/checkpoint-5", True), ("run/old/checkpoint-5", True)],
)  # fmt: skip
def test_a_run_begins_anew_unless_it_resumes_in_its_own_folder(
    tmp_path: Path, resumed: str, anew: bool
) -> None:
    (tmp_path / "x").mkdir()
    asked = resumed if resumed in ("", "latest") else str(tmp_path / resumed)
    config = CheckpointConfig(output_dir=str(tmp_path / "run"), resume_from_checkpoint=asked)
    assert config.begins_anew is anew


# The lock


def test_a_second_run_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    first, _ = begin(tmp_path)
    fill(tmp_path, "metrics.jsonl")
    before = content(tmp_path)
    for anew in (True, False):
        with pytest.raises(UserError, match=r"another run is writing there \(process [0-9]+ on .*\)"):
            begin(tmp_path, anew=anew, overwrite=True)
    assert content(tmp_path) == before
    first.lock.release()
    begin(tmp_path)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, sys, time
        from shoal.system.locks import Lock
        lock = Lock(pathlib.Path(sys.argv[1]))
        print(lock.take().name, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "HELD\n"
    assert Lock(tmp_path / "lock").is_busy()
    assert Lock(tmp_path / "lock").take() is Answer.BUSY
    holder.kill()
    holder.wait()
    assert not Lock(tmp_path / "lock").is_busy()
    assert Lock(tmp_path / "lock").take() is Answer.HELD


def test_where_there_are_no_locks_it_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    place = RunFolder(tmp_path)
    place.begin(anew=True, overwrite=False, ranks=1, say=said.append)
    assert place.is_marked
    (line,) = said
    assert "the file system has no locks" in line
