"""Generation from files of prompts: in order, the same for any number of workers, resumed after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from saved import saved

import shoal
from shoal.config.record import ModelConfig
from shoal.data import tokenizer
from shoal.errors import UserError
from shoal.models.export import export
from shoal.models.loading import load
from shoal.serve.blocks import _open_parts, read_prompts
from shoal.serve.generate import GenerateOptions, run
from shoal.serve.writer import Writer

PROMPTS = ["the shoal", "", "def turn", "no fish leads", "it "]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.train_bpe(["the shoal turns as one, no fish leads it"] * 20, 280, folder / "tokenizer")
    words = tokenizer.load(folder / "tokenizer")
    model = load(ModelConfig(name="llama-tiny", hidden_size=32, num_hidden_layers=1), len(words), 64, words)
    export(saved(model, words, folder / "checkpoint-1") / "model", folder / "final", {})
    return folder


@pytest.fixture
def options(trained: Path, tmp_path: Path) -> GenerateOptions:
    """A job over five prompts in three blocks."""
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    target = tmp_path / "out.jsonl"
    return GenerateOptions(
        str(trained), prompts_file=source, output_file=target, max_new_tokens=6, batch_size=2, seed=3
    )


def test_in_order_and_the_same_for_any_number_of_workers(options: GenerateOptions, tmp_path: Path) -> None:
    run(options)
    run(replace(options, output_file=tmp_path / "two.jsonl", nproc=2))
    run(replace(options, output_file=tmp_path / "other.jsonl", seed=4))
    one, two, other = ((tmp_path / name).read_bytes() for name in ("out.jsonl", "two.jsonl", "other.jsonl"))
    assert one == two != other
    rows = [json.loads(line) for line in one.decode().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(PROMPTS))
    assert all(row["completion"] for row in rows)
    assert not list(tmp_path.glob(".*"))


def test_a_killed_job_goes_on_and_leaves_no_worker(options: GenerateOptions, tmp_path: Path) -> None:
    many = replace(options, batch_size=1, max_new_tokens=60)
    run(replace(many, output_file=tmp_path / "whole.jsonl"))
    flags = [f"--{name}={value}" for name, value in [
        ("prompts-file", many.prompts_file), ("output-file", many.output_file), ("max-new-tokens", 60),
        ("batch-size", 1), ("seed", 3), ("nproc-per-node", 1),
    ]]  # fmt: skip
    command = [sys.executable, "-m", "shoal", "generate", many.model, *flags]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline().startswith("block 1 of 5")
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    parts = tmp_path / ".out.jsonl.parts"
    assert not many.output_file.exists()
    deadline = time.monotonic() + 30
    while _runs(str(parts)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(str(parts))

    finished = {each.name: each.stat().st_mtime_ns for each in parts.glob("block-*.jsonl")}
    assert 0 < len(finished) < len(PROMPTS)
    run(many)
    assert many.output_file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not parts.exists()


def _runs(word: str) -> bool:
    lines = (Path("/proc") / pid / "cmdline" for pid in os.listdir("/proc") if pid.isdigit())
    return any(word in line.read_text() for line in lines if line.exists())


def test_stop_text_ends_a_completion(options: GenerateOptions) -> None:
    whole = Writer(options).complete(PROMPTS[:2], block=0)
    stop = whole[0][2]
    stopped = Writer(replace(options, stop=[stop])).complete(PROMPTS[:2], block=0)
    assert stopped[0] == whole[0].split(stop)[0]


def test_a_prompt_is_completed_from_python(trained: Path) -> None:
    once, again, other = (
        shoal.generate(trained, PROMPTS[0], max_new_tokens=6, seed=seed) for seed in (3, 3, 4)
    )
    assert once == again != other
    with pytest.raises(UserError, match="there is no such folder"):
        shoal.generate(trained / "nowhere", "a")


def test_one_prompt_is_streamed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        run(GenerateOptions(str(trained), prompt="the shoal", max_new_tokens=5))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the shoal")
    assert len(texts[0].strip()) > len("the shoal")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts_file": None}, "--prompt"),
        ({"output_file": None}, "--output-file"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"nproc": 0}, "--nproc-per-node 0"),
        ({"model": "nowhere"}, "shoal generate nowhere: there is no such folder"),
        ({"max_new_tokens": 5000}, "--max-new-tokens 5000"),
    ],
)
def test_bad_input(options: GenerateOptions, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        run(replace(options, **changes))
    assert "\n" not in str(refused.value)


def test_what_is_there_stays(options: GenerateOptions) -> None:
    options.output_file.write_text("mine")
    with pytest.raises(UserError, match="it exists"):
        run(options)
    assert options.output_file.read_text() == "mine"


def test_what_somebody_put_among_the_parts_stays(options: GenerateOptions) -> None:
    mine = options.output_file.with_name(f".{options.output_file.name}.parts") / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="holds files that this command did not write"):
        run(options)
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]
    mine.rename(mine.parent.parent / "mine")
    _open_parts(mine.parent, options, read_prompts(Path(str(options.prompts_file))))
    (mine.parent.parent / "mine").rename(mine)
    run(options)
    assert options.output_file.exists()
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"prompt": ""}\n')
    assert read_prompts(path) == ["a\u2028b", ""]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 2 has no text `prompt`"):
        read_prompts(path)
    path.write_text('{"prompt": "a"}\nb\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(path)
    for odd in ("[" * 10**5, '{"prompt": ' + "9" * 5000 + "}", r'{"prompt": "\ud83d"}'):
        path.write_text(odd)
        with pytest.raises(UserError, match="line 1 "):
            read_prompts(path)


def test_prompts_are_read_in_the_forms_of_training_data(tmp_path: Path) -> None:
    """With a byte order mark, line ends of another system, and empty lines where they say nothing."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}\n \n')
    assert read_prompts(rows) == ["a", "b"]
    lines = tmp_path / "prompts.txt"
    lines.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\n\n\n")
    assert read_prompts(lines) == ["a", "", "b"]
