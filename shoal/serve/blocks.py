"""A file of prompts, completed in blocks by processes that are given one block after another.

Each block is a file of its own in a folder beside the output, so that a kill loses only the blocks under way.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.serve.options import GenerateOptions
from shoal.system import helpers

JOB = "job.json"


def complete_file(options: GenerateOptions) -> None:
    """Complete every prompt of `options.prompts_file` into `options.output_file`, going on where a kill ended.

    Raises UserError for what cannot be read or done.
    """
    source, target = Path(str(options.prompts_file)), Path(str(options.output_file))
    if target.exists():
        raise UserError(f"--output-file {target}", "it exists", "name another, or remove it")
    prompts = read_prompts(source)
    parts = target.with_name(f".{target.name}.parts")
    _open_parts(parts, options, prompts)
    blocks = range(-(-len(prompts) // options.batch_size))
    missing = [block for block in blocks if not _part(parts, block).is_file()]
    # One thread: a product on more could differ in its last bits, and with it the text.
    for done in helpers.hand_out("shoal.serve.blocks", parts, missing, options.nproc, OMP_NUM_THREADS="1"):
        print(f"block {done + 1} of {len(blocks)} is complete", flush=True)
    _merge(parts, blocks, target)
    print(f"completed {len(prompts)} prompts into {target}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt file, one a line, or of a .jsonl file, `prompt` of each; errors name file and line.

    Both may begin with a byte order mark. Empty lines at the end are no prompts, in JSONL nowhere.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {path}", str(error), "name a readable UTF-8 file") from error
    prompts = lines = text.rstrip("\n").split("\n") if text.strip("\n") else []
    if path.suffix == ".jsonl":
        numbered = ((f"{path} line {number}", line) for number, line in enumerate(lines, 1))
        prompts = [_prompt_of(line, where) for where, line in numbered if line and not line.isspace()]
    if not prompts:
        raise UserError(f"--prompts-file {path}", "it holds no prompt", "write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also huge integers and deep nesting
        found = f"{where} is not JSON ({error})"
        raise UserError("--prompts-file", found, "write one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError("--prompts-file", f"{where} has no text `prompt`", 'write {"prompt": "..."} a line')
    prompt = str(row["prompt"])
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(
            "--prompts-file", f"{where} has half a character (a lone surrogate)", "write it in UTF-8"
        )
    return prompt


def _open_parts(parts: Path, options: GenerateOptions, prompts: list[str]) -> None:
    """Make or reopen the folder of parts, one file a block of prompts; that of another job is refused."""
    text = json.dumps({"options": _deciding(options), "prompts": prompts})
    if (parts / JOB).is_file() and (parts / JOB).read_text(encoding="utf-8") != text:
        found = f"{parts} holds the beginning of another job"
        change = "remove that folder, or name another file"
        raise UserError(f"--output-file {options.output_file}", found, change)
    if parts.is_dir() and any(parts.iterdir()) and not (parts / JOB).is_file():
        found = f"{parts} holds files that this command did not write"
        raise UserError(f"--output-file {options.output_file}", found, "move it, or name another file")
    parts.mkdir(parents=True, exist_ok=True)
    _write_whole(parts / JOB, text)


def _deciding(options: GenerateOptions) -> dict[str, Any]:
    """The options that decide what is written: not where, nor how many share the work."""
    left_out = ("prompt", "prompts_file", "output_file", "nproc")
    return {name: value for name, value in asdict(options).items() if name not in left_out}


def _part(parts: Path, block: int) -> Path:
    return parts / f"block-{block:06d}.jsonl"


def _write_whole(path: Path, text: str) -> None:
    """Write a file aside and move it into place: it is whole or absent."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _merge(parts: Path, blocks: range, target: Path) -> None:
    aside = parts / "all"
    with aside.open("wb") as out:
        for block in blocks:
            out.write(_part(parts, block).read_bytes())
    aside.replace(target)
    for path in (*parts.glob("block-*.jsonl*"), *parts.glob(f"{JOB}*")):  # those of a killed process too
        path.unlink()
    with suppress(OSError):  # somebody has put something in
        parts.rmdir()


def _completer(folder: str) -> Callable[[int], int]:
    from shoal.serve.writer import Writer

    parts = Path(folder)
    job = json.loads((parts / JOB).read_text(encoding="utf-8"))
    size = job["options"]["batch_size"]
    writer = Writer(GenerateOptions(**job["options"]))

    def complete(block: int) -> int:
        prompts = job["prompts"][block * size :][:size]
        rows = _rows(block * size, prompts, writer.complete(prompts, block))
        _write_whole(_part(parts, block), "".join(rows))
        return block

    return complete


def _rows(first: int, prompts: list[str], completions: list[str]) -> Iterator[str]:
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), first):
        row = {"index": index, "prompt": prompt, "completion": completion}
        yield json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    helpers.serve(_completer)
