"""The command line: what it calls, what it prints, how it ends."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import shoal
from shoal import cli
from shoal.errors import BAD_INPUT, FAILED, Preempted, UserError


@pytest.fixture
def stub(monkeypatch):
    """Puts a module of the given contents in the place of a real one."""

    def put(name: str, **contents) -> None:
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules.get(parent, module), child, module, raising=False)

    return put


@pytest.fixture
def launched(stub):
    """Takes the place of the engine; holds what it was asked to launch."""
    calls = []

    def launch(resolved, *work):
        calls.append((resolved, *work))

    stub("shoal.engines", local=None)
    stub("shoal.engines.local", launch=launch)
    return calls


def exit_code(words):
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code


def test_python_m_shoal_is_shoal():
    done = subprocess.run([sys.executable, "-m", "shoal", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"shoal {shoal.__version__}\n")


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_names_every_verb(words, capsys):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"shoal {verb}" in printed for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    assert exit_code([verb, "--help"]) == 0
    assert "--" in capsys.readouterr().out


def test_train_resolves_recipe_and_flags(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {seed: 5, max_steps: 10}\n")
    assert cli.main(["train", str(recipe), "--max_steps", "3", "--exact"]) == 0
    config = launched[0][0].config
    assert (config.train.seed, config.train.max_steps, config.train.exact) == (5, 3, True)
    assert cli.main(["train"]) == 0
    assert launched[1][0].config.train.seed == 42


def test_evaluate_takes_the_settings_of_the_run_and_its_model(launched, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.resolved.yaml").write_text("model: {name: lstm}\ndata: {sequence_length: 64}\n")
    assert cli.main(["evaluate", str(tmp_path), "--nproc-per-node", "2"]) == 0
    resolved, work = launched[0]
    assert work == "evaluate"
    assert resolved.config.model.name == str(tmp_path / "final")
    assert resolved.config.data.sequence_length == 64
    assert resolved.config.launch.nproc_per_node == 2
    assert resolved.config.data.tokenizer == "train"  # as the run had it, so that its data is found again
    (tmp_path / "model").mkdir()
    assert cli.main(["evaluate", str(tmp_path / "model")]) == 0
    assert launched[1][0].config.model.name == str(tmp_path / "model")


def test_evaluate_on_other_data_keeps_the_tokenizer_of_the_run(launched, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.resolved.yaml").write_text(
        "model: lstm\ncheckpoint: {resume_from_checkpoint: latest}\n"
    )
    assert cli.main(["evaluate", str(tmp_path), "--data", "other.txt"]) == 0
    config = launched[0][0].config
    assert config.data.tokenizer == str(tmp_path / "final")
    assert config.checkpoint.resume_from_checkpoint == ""


def test_evaluate_of_nothing_is_refused(launched, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path / "nothere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not launched


def test_generate_passes_on_only_what_was_given(stub):
    @dataclass
    class GenerateOptions:
        model: str
        prompt: str | None = None
        prompts_file: Path | None = None
        stop: list[str] | None = None
        top_p: float = 0.9
        max_new_tokens: int = 7
        nproc: int = 1

    asked = []
    stub("shoal.serve", generate=None)
    stub("shoal.serve.generate", GenerateOptions=GenerateOptions, run=asked.append)
    words = [
        "runs/x",
        "--prompt",
        "a_b",
        "--top_p=0.5",
        "--stop",
        "x",
        "--stop",
        "y",
        "--nproc_per_node",
        "2",
    ]
    assert cli.main(["generate", *words]) == 0
    assert asked == [GenerateOptions("runs/x", "a_b", None, ["x", "y"], 0.5, 7, 2)]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_audit_tells_faults_by_its_exit_code(stub, capsys, ok, code):
    @dataclass
    class Audit:
        run: Path
        ok: bool

    stub("shoal.observe", ledger=None)
    stub("shoal.observe.ledger", audit=lambda run: Audit(run, ok))
    assert cli.main(["audit", "runs/x"]) == code
    assert capsys.readouterr().out == f"{Audit(Path('runs/x'), ok)}\n"


def test_config_show_prints_values_and_origins(capsys, monkeypatch):
    monkeypatch.setenv("SHOAL_SEED", "9")
    assert cli.main(["config", "show", "--lr", "2e-3"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["train"]["learning_rate"] == 2e-3
    assert "# flag --lr" in printed
    assert "# SHOAL_SEED" in printed


def test_config_validate(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {global_batch_size: 32}\n")
    assert cli.main(["config", "validate", str(recipe)]) == 0
    assert f"{recipe}: ok" in capsys.readouterr().out
    recipe.write_text("train: {global_batch_size: 9, per_device_train_batch_size: 4}\n")
    assert cli.main(["config", "validate", str(recipe)]) == 2
    assert "9 / 4 = 2.25" in capsys.readouterr().err
    assert cli.main(["config", "validate"]) == 2


def test_config_schema_is_json(capsys):
    assert cli.main(["config", "schema"]) == 0
    assert "train" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["train", "--sede", "1"],
        ["train", "none.yaml"],
        ["evaluate"],
        ["config", "fly"],
        ["generate"],
        ["generate", "x", "--fly", "1"],
        ["generate", "x", "--top-k", "many"],
        ["export"],
        ["export", "x"],
        ["export", "nothere", "--output-dir", "y"],
        ["export", "x", "--output-dir", "y", "--dtype", "int3"],
        ["audit"],
        ["doctor", "--jsn"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("shoal: error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("end", "code"), [(UserError("a", "b", "c"), 2), (Preempted("saved"), 75), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, end, code):
    def verb(words):
        raise end

    monkeypatch.setitem(cli.VERBS, "train", verb)
    assert cli.main(["train"]) == code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "runs/x"), "runs/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/cache"), "/cache: Permission denied"),
        (MemoryError(), "lower --per-device-train-batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory); lower --per-device-train-batch-size"),
        (RuntimeError("\nCUDA out of memory.\nmore"), "CUDA out of memory.); lower --per-device-train-batch-size"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_one_line_in_every_verb(monkeypatch, capsys, error, said):
    def verb(words):
        raise error

    monkeypatch.setitem(cli.VERBS, "train", verb)
    assert cli.main(["train"]) == (BAD_INPUT if "disk" in said else FAILED)
    printed = capsys.readouterr().err
    assert printed.startswith("shoal: error: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def verb(words):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "train", verb)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_train_from_python_is_the_same_run(launched, tmp_path, monkeypatch):
    from shoal import api

    (tmp_path / "summary.json").write_text('{"steps": 3, "eval/loss": 1.5}')
    summary = api.train(model="lstm", max_steps=3, output_dir=str(tmp_path))
    assert summary == {"steps": 3, "eval/loss": 1.5}
    assert (summary.steps, summary.metrics, summary.folder) == (3, {"loss": 1.5}, tmp_path)
    config = launched[0][0].config
    assert (config.model.name, config.train.max_steps) == ("lstm", 3)
    with pytest.raises(UserError, match="argument max_step: "):
        api.train(max_step=3)
