"""A checkpoint that is not what it says: one line, before anything is trained, and nothing is written over."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from laws.launches import BATCH, shoal
from laws.pool import Pool
from laws.rows import Net
from safetensors import safe_open
from safetensors.torch import save_file
from saved import piece_of

from shoal import checkpoint, cli
from shoal.checkpoint import Progress
from shoal.errors import BAD_INPUT, DONE, UserError
from shoal.layouts.base import whole_model
from shoal.optim.optimizers import NamedState
from shoal.system import manifest
from shoal.tensors import tensor_files

Damage = Callable[[Path], None]
placed = partial(whole_model, loss=lambda model, inputs: model(inputs))
ONE, OTHER = "model/00000.safetensors", "model/00001.safetensors"
STATE = "optimizer/00000.safetensors"


def cut_checkpoint(folder: Path) -> Path:
    """As two ranks leave it, with AdamW's moments."""
    model = checkpoint.model_tensors(placed(Net("plain", 0.0)))
    moments = {f"{name}/exp_avg": torch.zeros_like(tensor) for name, tensor in model.items()}
    parts = folder.with_name("parts")
    for kind, tensors in (("model", model), ("optimizer", moments)):
        (parts / kind).mkdir(parents=True)
        for rank in range(2):
            held, places = piece_of(tensors, rank, 2, 0)
            tensor_files.write(parts / checkpoint.rank_file(kind, rank), held, places)
    checkpoint.write(folder, {}, Progress(step=1), lambda folder: None, parts=parts)
    return folder


def take_up(folder: Path, model: torch.nn.Module) -> None:
    """What a run does that resumes from it."""
    checkpoint.find(str(folder), Path("unused"), print)
    checkpoint.load_progress(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    whole = placed(model)
    checkpoint.load_model(folder, whole)
    checkpoint.load_optimizer(
        folder, NamedState([optimizer], [(p.name, p.local) for p in whole.pieces]), whole
    )


def rewrite(file: str, change: Callable[[dict, dict], None]) -> Damage:
    """Change the tensors and the pieces' places of a file."""

    def damage(folder: Path) -> None:
        with safe_open(folder / file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            pieces = json.loads(opened.metadata()["blocks"])
        change(tensors, pieces)
        save_file(tensors, folder / file, metadata={"blocks": json.dumps(pieces)})

    return damage


def say_of_pieces(text: str) -> Damage:
    def damage(folder: Path) -> None:
        with safe_open(folder / ONE, "pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, folder / ONE, metadata={"blocks": text})

    return damage


def put(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content) and None


def flip(file: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)

    return damage


def state(**lies: object) -> Damage:
    return put("state.json", json.dumps(vars(Progress(step=1)) | lies))


def offset(name: str, *begin: int) -> Damage:
    return rewrite(ONE, lambda tensors, pieces: pieces[name][1][0].__setitem__(1, list(begin)))


# What was changed since it was saved, and what the line says.
CHANGED: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: (folder / ONE).unlink(), "00000.safetensors is missing"),
    "extra": (put("model/00002.safetensors", ""), "was not saved with it"),
    "truncated": (put(ONE, "half a file"), "bytes instead of"),
    "altered": (flip(ONE), "was altered"),
    "manifest is no JSON": (put("manifest.json", "{"), "manifest.json cannot be read"),
    "manifest is a list": (put("manifest.json", "[]"), "manifest.json cannot be read"),
    "manifest of a list": (put("manifest.json", '{"format": 1, "files": []}'), "manifest.json cannot be read"),
    "manifest of another format": (put("manifest.json", '{"format": 9, "files": {}}'), "its format is 9"),
    "another file's": (put("manifest.json", '{"format": 1, "files": {"../x": {}}}'), "../x is missing"),
}  # fmt: skip
# What was saved so: the manifest fits it.
FORGED: dict[str, tuple[Damage, str]] = {
    "no safetensors": (put(ONE, "nothing of the kind"), "use another checkpoint"),
    "a piece is missing": (lambda folder: (folder / OTHER).unlink(), "a part of it is in no file"),
    "a tensor is missing": (
        rewrite(ONE, lambda held, pieces: (held.pop("up.bias"), pieces.pop("up.bias"))),
        "up.bias is not whole",
    ),
    "a tensor is named only": (rewrite(ONE, lambda held, _: held.pop("up.bias")), "which does not hold it"),
    "an extra tensor": (rewrite(ONE, lambda held, _: held.update(more=torch.ones(2))), "holds a tensor more"),
    "overlap": (offset("up.weight", 8, 0), "up.weight has pieces that overlap"),
    "outside": (offset("up.weight", 12, 0), "lies outside of it"),
    "of other dims": (offset("up.weight", 0), "lies outside of it"),
    "negative": (offset("up.weight", -1, 0), "its metadata does not say"),
    "pieces are no JSON": (say_of_pieces("{"), "its metadata does not say"),
    "pieces are a list": (say_of_pieces("[]"), "its metadata does not say"),
    "pieces of numbers": (say_of_pieces('{"up.bias": 3}'), "its metadata does not say"),
    "shapes disagree": (
        rewrite(ONE, lambda _, pieces: pieces["up.bias"].__setitem__(0, [99])),
        "another shape or dtype",
    ),
    "dtypes disagree": (
        rewrite(ONE, lambda held, _: held.update({"up.bias": held["up.bias"].double()})),
        "another shape or dtype",
    ),
    "state is no JSON": (put("state.json", "{"), "state.json"),
    "state is a list": (put("state.json", "[]"), "state.json"),
    "state of text": (state(step="many"), "state.json"),
    "state before the start": (state(step=-1), "state.json"),
    "state without a file": (lambda folder: (folder / "state.json").unlink(), "state.json"),
    "of no parameter": (
        rewrite(STATE, lambda held, _: held.update({"nothere/exp_avg": torch.ones(2)})),
        "of no parameter of the model",
    ),
    "moments overlap": (
        rewrite(STATE, lambda _, pieces: pieces["up.weight/exp_avg"][1][0].__setitem__(1, [8, 0])),
        "overlap",
    ),
}


@pytest.mark.parametrize("case", [*CHANGED, *FORGED])
def test_it_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    folder = cut_checkpoint(tmp_path / "checkpoint-1")
    take_up(folder, Net("plain", 0.0))
    damage, said = (CHANGED | FORGED)[case]
    damage(folder)
    if case in FORGED:
        manifest.write(folder, step=1, tokens=0)
    refused(folder, Net("plain", 0.0), said)


@pytest.mark.parametrize("case", ["another shape", "whole numbers", "moments of another shape"])
def test_what_is_whole_but_of_another_model(case: str, tmp_path: Path) -> None:
    model = checkpoint.model_tensors(placed(Net("plain", 0.0)))
    moments = {f"{name}/exp_avg": torch.zeros_like(tensor) for name, tensor in model.items()}
    if case == "another shape":
        model["up.bias"] = torch.zeros(7)
    elif case == "whole numbers":
        model["up.bias"] = model["up.bias"].long()
    else:
        moments["up.bias/exp_avg"] = torch.zeros(7)
    files = {"model/model.safetensors": model, "optimizer/state.safetensors": moments}
    checkpoint.write(tmp_path / "checkpoint-1", files, Progress(step=1), None)
    refused(tmp_path / "checkpoint-1", Net("plain", 0.0), "up.bias")


def refused(folder: Path, model: torch.nn.Module, said: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        take_up(folder, model)
    assert "\n" not in str(caught.value)
    assert said in str(caught.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(pool: Pool, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose replica two workers held."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    words = ["train", *data, *BATCH, "--strategy", "zero3", "--nproc-per-node", "2", "--max-steps", "1"]
    done = pool.alone(shoal, [*words, "--output-dir", str(folder)])
    assert done.code == DONE, done.output
    return folder


def test_by_every_verb(
    pool: Pool, data: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, and what stood in the way stands there still; before that, it works."""
    good, out = run / "checkpoint-1", tmp_path / "out"
    assert cli.main(["export", str(run), "--output-dir", str(out), "--dtype", "bfloat16"]) == DONE
    assert "exported" in capsys.readouterr().out
    assert (run / "final" / "model.safetensors").stat().st_size > (out / "model.safetensors").stat().st_size
    assert cli.main(["export", str(good), "--output-dir", str(out)]) == BAD_INPUT
    assert "it exists" in capsys.readouterr().err
    assert cli.main(["generate", str(good), "--prompt", "x"]) == BAD_INPUT
    assert "in pieces; put it together: shoal export" in capsys.readouterr().err

    (run / "checkpoint-1" / "model" / "more.safetensors").write_bytes(b"")
    for words in (
        ["export", str(good), "--output-dir", str(tmp_path / "new")],
        ["evaluate", str(good)],
        ["generate", str(good), "--prompt", "x"],
    ):
        assert cli.main(words) == BAD_INPUT
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert "more.safetensors was not saved with it" in said.err
    assert not (tmp_path / "new").exists()

    manifest.write(good, step=1, tokens=0)
    words = ["train", *data, *BATCH, "--nproc-per-node", "2", "--output-dir", str(tmp_path / "resumed")]
    resumed = pool.alone(shoal, [*words, "--resume-from-checkpoint", str(good)])
    assert resumed.code == BAD_INPUT
    assert resumed.output.count("shoal: error: ") == 1
    assert "more.safetensors" in resumed.output
    assert not (tmp_path / "resumed").exists()
