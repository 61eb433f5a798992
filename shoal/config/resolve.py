"""File, environment and flags to one record, with the origin of every value."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.config.flags import flag_settings
from shoal.config.layout import STAGES
from shoal.config.names import Setting, names, sections, setting, unknown
from shoal.config.record import RunConfig
from shoal.config.sources import environment_settings, file_settings
from shoal.config.strategies import SUMMING
from shoal.config.values import at_home
from shoal.errors import UserError, quoted

# A setting that another one excludes: given by a stronger source, it sets the other of a weaker one aside.
EXCLUDES = {"train.num_train_epochs": "train.max_steps", "data.eval_fraction": "data.eval_path"}
# Any two of them give the third; which one follows first, where a stronger source gives another.
FOLLOWS = (
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
    "train.per_device_train_batch_size",
)
BATCH = frozenset(FOLLOWS)


@dataclass(frozen=True)
class Resolved:
    """The record of a run, and where each value came from: {"train.seed": "recipe.yaml:7"}."""

    config: RunConfig
    origins: dict[str, str]


def load_config(
    file: Path | None = None,
    flags: list[str] | None = None,
    environ: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Resolved:
    """The record of a run: defaults, then file, environment, flags, and the arguments of a Python call.

    `environ` is this process's own if None. Folders left empty (`cache_dir`, `output_dir`) are filled in.
    Raises UserError, naming the origin, for whatever is no setting or does not fit its type.
    """
    environ = os.environ if environ is None else environ
    given = [
        file_settings(Path(at_home(str(file)))) if file else [],
        environment_settings(environ),
        flag_settings(flags or []),
        [each for name, value in arguments.items() for each in _arguments(name, value)],
    ]
    last: dict[str, Setting] = {}
    for source in given:
        own = {each.key: each for entry in source for each in _spelled_out(entry)}
        last = {key: each for key, each in last.items() if key not in _excluded(own, last)} | own
    config = _validated(last)
    origins = {key: last[key].origin if key in last else "default" for key in _keys(config)}
    return _with_folders(Resolved(config, origins), environ)


def dump_yaml(resolved: Resolved) -> str:
    """The record as YAML that `load_config` reads back, the origin of each value behind it."""
    lines = []
    for section in sections():
        lines.append(f"{section}:")
        for field, value in getattr(resolved.config, section).model_dump().items():
            entry = f"  {_yaml_entry(field, value)}"
            lines.append(f"{entry:<48}  # {resolved.origins[f'{section}.{field}']}")
    return "\n".join(lines) + "\n"


def _yaml_entry(field: str, value: Any) -> str:
    import yaml

    return yaml.safe_dump({field: value}, default_flow_style=True, width=inf).strip()[1:-1]


def _excluded(own: Mapping[str, Setting], before: Mapping[str, Setting]) -> set[str]:
    """What a stronger source sets aside of a weaker one without naming it: it excludes that, or that follows."""
    excluded = {other for key, other in EXCLUDES.items() if key in own and other not in own}
    stage, strategy = before.get("layout.zero_stage"), before.get("strategy.name")
    if stage and strategy and stage.origin == strategy.origin and "strategy.name" in own:
        excluded.add(stage.key)  # both were one word, as in --strategy zero3
    if batch := BATCH & own.keys():
        weaker = [key for key in FOLLOWS if key in before and key not in batch]
        excluded |= set(weaker[: max(0, len(weaker) + len(batch) - 2)])
    return excluded


def _spelled_out(entry: Setting) -> list[Setting]:
    """`strategy: zero3` is all-reduce between replicas that are each cut over workers."""
    named = entry.key == "strategy.name" and isinstance(entry.value, str)
    stage = STAGES.get(entry.value) if named else None
    if stage is None:
        return [entry]
    return [
        replace(entry, value=SUMMING),
        replace(entry, section="layout", field="zero_stage", value=stage),
    ]


def _arguments(name: str, value: Any) -> Iterator[Setting]:
    """The settings of one argument of a Python call; a section may be a dict, as in `model={"name": "gpt2"}`."""
    if name in sections() and isinstance(value, Mapping):
        for field, each in value.items():
            yield from _arguments(f"{name}.{field}", each)
        return
    found = setting(name, value, f"argument {name}")
    if found is None:
        raise unknown(f"argument {name}", name, names(), str, "see `shoal config show`")
    yield found


def _validated(last: Mapping[str, Setting]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for entry in last.values():
        tree[entry.section][entry.field] = entry.value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = {_place(problem): _problem(problem, last) for problem in error.errors()}
    if len(problems) == 1:
        raise UserError(*problems.popitem()[1])
    listed = " | ".join(f"{asked}: {found}; {change}" for asked, found, change in problems.values())
    raise UserError("the configuration", f"{len(problems)} problems: {listed}", "correct them")


def _place(problem: Any) -> str:
    """`train.seed` (what pydantic adds behind it tells the members of a union apart)"""
    return ".".join(str(part) for part in problem["loc"][:2])


def _problem(problem: Any, last: Mapping[str, Setting]) -> tuple[str, str, str]:
    """(asked, found, change) of one problem that pydantic found."""
    key = _place(problem)
    message = str(problem.get("ctx", {}).get("error", problem["msg"])).removeprefix("Input ")
    return last[key].asked, f"{quoted(problem['input'])} does not fit", f"it {message}"


def _keys(config: RunConfig) -> list[str]:
    return [f"{section}.{field}" for section in sections() for field in getattr(config, section).model_dump()]


def _with_folders(resolved: Resolved, environ: Mapping[str, str]) -> Resolved:
    config, origins = resolved.config, dict(resolved.origins)
    data, checkpoint = config.data, config.checkpoint
    if not data.cache_dir:
        home = environ.get("XDG_CACHE_HOME")
        origins["data.cache_dir"] = "XDG_CACHE_HOME" if home else "default"
        with suppress(RuntimeError):  # no home: an error only where it is needed, in `data.cache.folder_of`
            found = Path(home or "~/.cache").expanduser() / "shoal"
            data = data.model_copy(update={"cache_dir": str(found)})
    if not checkpoint.output_dir:
        folder = str(Path("runs") / Path(config.model.name).resolve().name)
        checkpoint = checkpoint.model_copy(update={"output_dir": folder})
    return Resolved(config.model_copy(update={"data": data, "checkpoint": checkpoint}), origins)
