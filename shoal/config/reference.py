"""The settings in words, from their one definition: `--help`, docs/configuration.md, the JSON schema."""

import re
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from shoal.config.codecs import CODECS
from shoal.config.layout import STAGES
from shoal.config.names import Fact, facts, sections
from shoal.config.presets import PRESETS
from shoal.config.record import RunConfig
from shoal.config.strategies import STRATEGIES
from shoal.errors import UserError

WIDTH, COLUMN = 80, 28  # of the help, and of the meanings in it
# The sections and settings that a verb reads, where it is not all of them.
READ = {
    "prepare": ("model.name", "data", "train.task"),
    "evaluate": (
        *(
            "model",
            "data",
            "layout",
            "launch",
            "train.task",
            "train.precision",
            "train.compile",
            "train.threads",
        ),
        *("train.per_device_train_batch_size", "eval.quantize"),
    ),
}

_FORMS = {int: "N", float: "X", str: "TEXT", bool: "true|false", list[str]: "A,B"}

_INTRODUCTION = """\
# Configuration

Written by `shoal config docs` from the one definition in `shoal/config/record.py`.

- **Precedence**: default, then recipe file, then environment, then flag. `shoal config show [recipe] [flags]`
  prints the result, and where each value came from; every run saves the same as `config.resolved.yaml`.
- **Flags**: `--learning-rate 1e-3`, `--learning_rate=1e-3` and `--train.learning-rate 1e-3` are one. Yes/no
  settings: `--exact`, `--no-exact`, `--exact true`. Lists: `--data a,b`, `--data a b` or repeated. Sizes:
  `10k`, `2e9`, `1B`. A recipe comes before the flags.
- **Environment**: `SHOAL_LEARNING_RATE=1e-3`.
- **Recipe**: sections as below, as in `train: {learning_rate: 1e-3}`; `model: gpt2` is short for
  `model: {name: gpt2}`. A value means what it means behind the flag: `no`, `012` and `1e-3` are not YAML's.
- **Paths**: `~` is the home folder, wherever the setting comes from.
- **Batch**: global batch size = per-device batch size x accumulation x workers; any two give the third.
- A setting that does not exist is refused, with the file and line and the nearest one that does.
- `shoal config schema` prints a JSON schema for editors.
"""


def help_text(verb: str = "train", word: str = "") -> str:
    """The flags that `verb` reads, by section, in WIDTH columns; only those that `word` is about, if one is given.

    Raises UserError where nothing is about that word.
    """
    lines = []
    for section, definition in sections().items():
        told = [fact for fact in _of(section) if _is_read(verb, fact) and _is_about(word, fact)]
        if told:
            heading = textwrap.wrap(f"{section}: {definition.__doc__}", WIDTH)
            lines += ["", *heading] if not word else [""]
            lines += [line for fact in told for line in _entry(fact)]
        if section == "model" and not word:
            lines += _wrapped("--model.DIMENSION VALUE", "any dimension, as in --model.hidden-size 64")
    tables = _tables(word)
    if word and not lines + tables:
        raise UserError(f"--help {word}", "no flag is about it", "`shoal train --help` lists the flags")
    return "\n".join(lines + tables)


def _is_read(verb: str, fact: Fact) -> bool:
    if verb in fact.readers:
        return True
    keys = READ.get(verb)
    return "evaluate" not in fact.readers and (keys is None or fact.section in keys or fact.key in keys)


def _is_about(word: str, fact: Fact) -> bool:
    word = word.lstrip("-").replace("-", "_").lower()
    names = (fact.key, *fact.aliases, *fact.switches, *fact.readers)
    described = re.split(r"\W+", str(fact.info.description).lower())
    return not word or any(word in name.lower() for name in names) or word in described


def _entry(fact: Fact) -> list[str]:
    """A flag in lines: its value, its meaning, the values that it may have, its other names, its default."""
    value, choices = form(fact), ""
    if "|" in value and not fact.is_yes_or_no:
        value, choices = fact.field.rpartition("_")[2].upper(), f" ({value.replace('|', ', ')})"
    flag = fact.flag if fact.is_yes_or_no else f"{fact.flag} {value}"
    also = [f"--{name.replace('_', '-')}" for name in (*fact.switches, *fact.aliases)]
    named = f"; also {', '.join(also)}" if also else ""
    has_default = fact.info.default not in (None, "", False, [])
    default = f" [{_written(fact.info.default)}]" if has_default else ""
    return _wrapped(flag, f"{fact.info.description}{choices}{named}{default}")


def _wrapped(flag: str, text: str) -> list[str]:
    first, indent = f"  {flag:<{COLUMN - 3}} ", " " * COLUMN
    own_line = len(first) > COLUMN
    begin = indent if own_line else first
    rows = textwrap.wrap(text, WIDTH, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False)
    return [f"  {flag}", *rows] if own_line else rows


def _tables(word: str) -> list[str]:
    """The names that some flags take."""
    tables = {
        "--strategy": [
            *STRATEGIES,
            *STAGES,
            *(alias for each in STRATEGIES.values() for alias in each.aliases),
        ],
        "--codec": [*CODECS],
        "--model": [*PRESETS],
    }
    shown = {flag: names for flag, names in tables.items() if word in ("", *names, flag.lstrip("-"))}
    return [
        line for flag, names in shown.items() for line in ("", *_wrapped(f"{flag} takes", ", ".join(names)))
    ]


def markdown() -> str:
    """The page docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, definition in sections().items():
        parts.append(
            f"## {section}\n\n{definition.__doc__}\n\n| flag | key | value | default | meaning | also |"
        )
        parts.append("|---|---|---|---|---|---|")
        parts += [_row(fact) for fact in _of(section)]
        parts.append("")
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def form(fact: Fact) -> str:
    """What a value looks like: `N`, `cosine|linear|constant`."""
    return _form(fact.info.annotation)


def _form(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(arguments)
    if origin is Annotated:
        return _form(arguments[0])
    if origin in (Union, UnionType):
        return "|".join(_form(argument) for argument in arguments if argument is not NoneType)
    return _FORMS[annotation]


def _of(section: str) -> list[Fact]:
    return [fact for fact in facts() if fact.section == section]


def _row(fact: Fact) -> str:
    also = ", ".join(f"`--{name.replace('_', '-')}`" for name in (*fact.aliases, *fact.switches))
    default = f"`{_written(fact.info.default)}`" if fact.info.default not in (None, "", []) else ""
    cells = (f"`{fact.flag}`", f"`{fact.key}`", f"`{form(fact)}`", default, fact.info.description, also)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list) else str(value)
