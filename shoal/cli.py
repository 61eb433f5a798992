"""The command line: one function a verb, which parses, calls and prints. Heavy imports wait for the call."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shoal.engines.signals import heard, nothing_to_save
from shoal.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    Preempted,
    UserError,
    choose,
    foreseen,
)
from shoal.system import output

if TYPE_CHECKING:
    from shoal.config import Resolved


def command() -> NoReturn:
    """The command `shoal` itself: `main`, and the way out of the process."""
    output.forgive()
    code = main()
    from shoal.engines.environment import is_worker

    with suppress(UserError):  # the environment contradicts itself, as `main` has said
        if is_worker():
            from shoal.engines.worker import leave

            leave(code)
    sys.exit(code)


def main(words: list[str] | None = None) -> int:
    """Run `shoal` with these words (those of the command line if None); returns the exit code.

    0 done, 1 failed, 2 bad input, 75 stopped and saved (start again to go on), 130 interrupted.
    """
    words = sys.argv[1:] if words is None else words
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each try to reach it would be a line
    try:
        with heard(nothing_to_save, signal.SIGTERM) if verb in LAUNCHED else nullcontext():
            return VERBS[verb](rest) if verb in VERBS else _about(verb)
    except KeyboardInterrupt as asked:
        if _speaks():
            output.say(f"shoal: {str(asked) or 'interrupted'}")
        return INTERRUPTED
    except Exception as error:
        return _tell(error)


def train(words: list[str]) -> int:
    """Train a model: shoal train [RECIPE.yaml] [--flag value ...]"""
    if _asks_help(words):
        return _print_settings(train, words)
    resolved = _resolve(words)
    from shoal.engines.local import launch

    launch(resolved)
    return DONE


def prepare(words: list[str]) -> int:
    """Turn text into token shards and stop: shoal prepare [RECIPE.yaml] [--flag value ...]"""
    if _asks_help(words):
        return _print_settings(prepare, words)
    config = _resolve(words).config
    from shoal.tasks import TASKS

    output.result(str(choose("--task", config.train.task, TASKS).prepare(config, True)))
    return DONE


def evaluate(words: list[str]) -> int:
    """Measure a run, a checkpoint or a model on held-out data: shoal evaluate FOLDER [--flag value ...]"""
    if _asks_help(words):
        return _print_settings(evaluate, words)
    folder, flags = _first_word(words, "the folder of a run, a checkpoint or a model")
    from shoal.checkpoint.model_folder import settings_of
    from shoal.engines.local import launch

    metrics = launch(settings_of(_path(folder), flags), "evaluate")
    if metrics is not None:  # this process may be a worker beside rank 0
        output.result(json.dumps(metrics))
    return DONE


def generate(words: list[str]) -> int:
    """Write on from a prompt, or from each prompt of a file: shoal generate FOLDER --prompt TEXT"""
    parser = _Parser(generate)
    parser.add_argument(
        "model",
        metavar="FOLDER",
        type=os.path.expanduser,
        help="the folder of a run, a checkpoint or a model",
    )
    parser.add_argument("--prompt", help="the text to go on from; streamed to the terminal")
    parser.add_argument(
        "--prompts-file", type=_path, help="prompts: .txt, one a line, or .jsonl with `prompt`"
    )
    parser.add_argument("--output-file", type=_path, help="where completions go as JSONL, in order")
    parser.add_argument("--max-new-tokens", type=int, help="the most tokens to add")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw among so many of the likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="draw among the likeliest tokens of this joint probability"
    )
    parser.add_argument("--stop", action="append", help="a text that ends a completion; may be repeated")
    parser.add_argument("--seed", type=int, help="fixes what is drawn, at any worker count")
    parser.add_argument("--quantize", help="hold the weights as int8 or int4")
    parser.add_argument("--batch-size", type=int, help="prompts at once")
    parser.add_argument("--nproc-per-node", dest="nproc", type=int, help="workers that share the prompts")
    options = parser.parse(words)
    from shoal.serve.generate import GenerateOptions, run

    run(GenerateOptions(**vars(options)))
    return DONE


def export(words: list[str]) -> int:
    """Make the Hugging Face folder of a checkpoint, whole or in pieces: shoal export FOLDER --output-dir OUT"""
    parser = _Parser(export)
    parser.add_argument(
        "source", metavar="FOLDER", type=_path, help="a checkpoint, or a run: then its newest valid one"
    )
    parser.add_argument("--output-dir", type=_path, required=True, help="the folder to make")
    parser.add_argument("--best", action="store_true", help="of a run the best checkpoint, not the newest")
    parser.add_argument("--max-shard-size", help="weights above it go into several files (5GB)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; that of the checkpoint by default")
    options = parser.parse(words)
    from shoal.checkpoint.export import ExportOptions, run

    run(ExportOptions(**vars(options)))
    return DONE


def audit(words: list[str]) -> int:
    """Prove from the ledger of a run that each sample was used exactly once: shoal audit RUN"""
    parser = _Parser(audit)
    parser.add_argument("run", type=_path, help="the folder of a run that was trained with --ledger")
    folder = parser.parse(words).run
    from shoal.observe import ledger

    report = ledger.audit(folder)
    output.result(str(report))
    return DONE if report.ok else FAILED


def doctor(words: list[str]) -> int:
    """Examine hardware, software and the network between workers: shoal doctor [--peer HOST:PORT] [--json]"""
    parser = _Parser(doctor)
    parser.add_argument("--json", action="store_true", default=False, help="print the findings as JSON")
    parser.add_argument(
        "--peer",
        metavar="HOST:PORT",
        default="",
        help="examine the link between two hosts: run it on both, with an address of one of them",
    )
    options = parser.parse(words)
    from shoal.diagnose import doctor as examination
    from shoal.diagnose import peer

    findings = peer.examine(options.peer) if options.peer else examination.examine(os.environ)
    output.result(examination.as_json(findings) if options.json else examination.as_text(findings))
    return FAILED if any(finding.verdict == "fail" for finding in findings) else DONE


def config(words: list[str]) -> int:
    """See and check settings: shoal config show|validate|schema|docs [RECIPE.yaml] [--flag value ...]"""
    if not words or _asks_help(words):
        return _print_settings(config, words)
    what, rest = words[0], words[1:]
    from shoal.config import (
        check_options,
        dump_yaml,
        reference,
        resolve_batch,
        resolve_grid,
        resolve_workers,
        team_size,
    )
    from shoal.engines.environment import machine

    if what == "show":
        output.result(dump_yaml(_resolve(rest)), end="")
    elif what == "validate":
        recipe, _ = _first_word(rest, "the path of a recipe")
        resolved = _resolve(rest)
        run = resolved.config
        check_options(resolved)
        workers = resolve_workers(run, machine(run))
        batch = resolve_batch(run, workers // team_size(run))
        sizes = resolve_grid(run, workers).items()
        grid = " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1 or axis == "replicate")
        output.result(
            f"{recipe}: ok; with {workers} workers here ({grid}), a step of {batch.global_batch_size} samples in "
            f"{batch.micro_batches} micro-batches of {batch.per_device_train_batch_size}"
        )
    elif what == "schema":
        output.result(json.dumps(reference.json_schema(), indent=2))
    elif what == "docs":
        output.result(reference.markdown(), end="")
    else:
        raise UserError(
            f"shoal config {what}", "there is no such verb", "take show, validate, schema or docs"
        )
    return DONE


VERBS: dict[str, Callable[[list[str]], int]] = {
    verb.__name__: verb for verb in (train, evaluate, generate, export, prepare, audit, doctor, config)
}
LAUNCHED = ("train", "evaluate")  # verbs that start workers; stopped before that, they have nothing to save


def _about(word: str) -> int:
    """What is said where no verb is given: the help, the version, or that there is no such verb."""
    import shoal

    if word == "--version":
        output.result(f"shoal {shoal.__version__}")
        return DONE
    if word not in ("-h", "--help", "help"):
        raise UserError(f"shoal {word}", "there is no such verb", f"take one of {', '.join(VERBS)}")
    lines = [
        f"shoal {shoal.__version__}: {shoal.__doc__}\n\nusage: shoal VERB ... (shoal VERB --help says more)\n"
    ]
    for name, verb in VERBS.items():
        purpose, usage = str(verb.__doc__).split(": ", 1)
        lines += [f"  {name:<10} {purpose}", f"  {'':<10}   {usage}"]
    output.result("\n".join(lines))
    return DONE


def _tell(error: Exception) -> int:
    """Print an error as one line; returns its exit code. Raises it again where its traceback is needed."""
    line = foreseen(error)
    if line is None:
        raise error
    if line.exit_code != DONE and (not line.of_all or _speaks()):
        output.say(f"shoal: {line}" if isinstance(line, Preempted) else f"shoal: error: {line}")
    return line.exit_code


def _speaks() -> bool:
    """Whether this process says what every worker has to say."""
    from shoal.engines.environment import speaks

    try:
        return speaks()
    except UserError:  # the environment contradicts itself
        return True


def _asks_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _print_settings(verb: Callable[[list[str]], int], words: list[str]) -> int:
    from shoal.config.reference import help_text

    word = next((word for word in words if word not in ("-h", "--help")), "")
    output.result(f"{verb.__doc__}\n{help_text(verb.__name__, word)}")
    return DONE


def _resolve(words: list[str]) -> "Resolved":
    """The record that an optional recipe and the flags behind it make."""
    from shoal.config import load_config

    has_recipe = bool(words) and not words[0].startswith("-")
    return load_config(Path(words[0]) if has_recipe else None, words[1:] if has_recipe else words)


def _first_word(words: list[str], what: str) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        raise UserError("shoal", f"{what} is missing", "give it behind the verb")
    return words[0], words[1:]


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # as the settings do


class _Parser(argparse.ArgumentParser):
    """Flags of a verb that trains nothing. What is not given is left out: the callee owns the defaults."""

    def __init__(self, verb: Callable[[list[str]], int]) -> None:
        self.verb = verb.__name__
        purpose = str(verb.__doc__).split(": ", 1)[0]
        super().__init__(
            prog=f"shoal {self.verb}",
            description=purpose,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def parse(self, words: list[str]) -> Any:
        """The given options; `-` and `_` are alike in the names of flags."""
        return self.parse_args([self._dashed(word) for word in words])

    @staticmethod
    def _dashed(word: str) -> str:
        flag, equals, value = word.partition("=")
        return flag.replace("_", "-") + equals + value if word.startswith("--") else word

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, as everywhere."""
        raise UserError(f"shoal {self.verb}", message, f"see `shoal {self.verb} --help`")
