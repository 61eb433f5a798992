"""The settings in words, from their one definition: `--help`, docs/configuration.md, the JSON schema."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from shoal.config.names import Fact, facts, sections
from shoal.config.record import RunConfig

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


def help_text() -> str:
    """The flags by section, one line each with its default."""
    lines = []
    for section, definition in sections().items():
        lines.append(f"\n{section}: {definition.__doc__}")
        for fact in _of(section):
            flag = fact.flag if fact.is_yes_or_no else f"{fact.flag} {form(fact)}"
            switches = "".join(f"; --{name}" for name in fact.switches)
            default = (
                "" if fact.info.default in (None, "", False, []) else f" [{_written(fact.info.default)}]"
            )
            gap = " " if len(flag) < 40 else "\n" + " " * 43
            lines.append(f"  {flag:<40}{gap}{fact.info.description}{switches}{default}")
        if section == "model":
            lines.append(f"  {'--model.DIMENSION VALUE':<40} any dimension, as in --model.hidden-size 64")
    return "\n".join(lines)


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
