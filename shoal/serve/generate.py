"""Text from a trained model: streamed for one prompt, or data-parallel over a file of prompts."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import UserError

JOB = "job.json"


@dataclass(frozen=True)
class GenerateOptions:
    """What to write on from, and how; `model` is a run's folder, a Hugging Face folder or a hub name."""

    model: str
    prompt: str | None = None
    prompts_file: Path | None = None  # .txt, one a line, or .jsonl with `prompt`
    output_file: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 50  # 0 is all
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 42
    batch_size: int = 8
    nproc: int = 1


def run(options: GenerateOptions) -> None:
    """Stream the completion of `prompt`, or complete every prompt of `prompts_file` into `output_file`.

    The file has one JSON object a prompt, in order (index, prompt, completion), the same for any number of
    workers; the same command goes on after a kill. Raises UserError for what cannot be done.
    """
    _check(options)
    if options.prompt is not None:
        from shoal.serve.writer import Writer

        Writer(options).stream(options.prompt)
        return
    from shoal.serve import workers

    source, target = Path(str(options.prompts_file)), Path(str(options.output_file))
    if target.exists():
        raise UserError(f"--output-file {target}", "it exists", "name another, or remove it")
    prompts = read_prompts(source)
    parts = target.with_name(f".{target.name}.parts")
    blocks = _open_parts(parts, options, prompts)
    missing = [block for block in blocks if not part(parts, block).is_file()]
    for done in workers.complete(parts, missing, options.nproc):
        print(f"block {done + 1} of {len(blocks)} is complete", flush=True)
    _merge(parts, blocks, target)
    print(f"completed {len(prompts)} prompts into {target}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt (one a line) or .jsonl file (`prompt` of each); errors name file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {path}", str(error), "name a readable UTF-8 file") from error
    prompts = lines = text.removesuffix("\n").split("\n") if text else []
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    if not prompts:
        raise UserError(f"--prompts-file {path}", "it holds no prompt", "write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            "--prompts-file", f"{where} is not JSON ({error})", "write one object a line"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError("--prompts-file", f"{where} has no text `prompt`", 'write {"prompt": "..."} a line')
    return str(row["prompt"])


def _check(options: GenerateOptions) -> None:
    if (options.prompt is None) == (options.prompts_file is None):
        raise UserError("shoal generate", "not one of --prompt and --prompts-file", "give one of the two")
    if options.prompts_file is not None and options.output_file is None:
        raise UserError("--prompts-file", "no --output-file", "say where completions go")
    for flag, value, least in [
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--batch-size", options.batch_size, 1),
        ("--nproc-per-node", options.nproc, 1),
        ("--temperature", options.temperature, 0),
        ("--top-k", options.top_k, 0),
    ]:
        if value < least:
            raise UserError(f"{flag} {value}", "too small", f"set at least {least}")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}", "not a probability above 0", "set it above 0, at most 1")


def _open_parts(parts: Path, options: GenerateOptions, prompts: list[str]) -> range:
    """Make or reopen the folder of parts, one file a block of prompts; that of another job is refused."""
    text = json.dumps({"options": _deciding(options), "prompts": prompts})
    if (parts / JOB).is_file() and (parts / JOB).read_text(encoding="utf-8") != text:
        found = f"{parts} holds the beginning of another job"
        raise UserError(
            f"--output-file {options.output_file}", found, "remove that folder, or name another file"
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_whole(parts / JOB, text)
    return range(-(-len(prompts) // options.batch_size))


def _deciding(options: GenerateOptions) -> dict[str, Any]:
    """The options that decide what is written: not where, nor how many share the work."""
    left_out = ("prompt", "prompts_file", "output_file", "nproc")
    return {name: value for name, value in asdict(options).items() if name not in left_out}


def part(parts: Path, block: int) -> Path:
    """The file of one block of prompts: whole or absent, so that a kill loses only the blocks under way."""
    return parts / f"block-{block:06d}.jsonl"


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and move it into place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _merge(parts: Path, blocks: range, target: Path) -> None:
    aside = parts / "all"
    with aside.open("wb") as out:
        for block in blocks:
            out.write(part(parts, block).read_bytes())
    aside.replace(target)
    shutil.rmtree(parts)
