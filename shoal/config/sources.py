"""Settings from a YAML file, with the line of each, and from the environment."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from shoal.config.names import Setting, names, nearest, sections, setting, unknown
from shoal.errors import UserError

PREFIX = "SHOAL_"
# What Kubernetes sets for a service, such as one called shoal-data.
SERVICE = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")


def environment_settings(environ: Mapping[str, str]) -> list[Setting]:
    """The settings that variables such as SHOAL_SEED give.

    Raises UserError for a variable that is nearly the name of a setting. Others that begin with SHOAL_ are
    not ours to judge, nor is what Kubernetes sets for a service whose name begins with shoal.
    """
    settings = []
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        name = variable.removeprefix(PREFIX).lower()
        if name in names():
            found = setting(name, environ[variable], variable)
            assert found is not None
            settings.append(found)
        elif SERVICE.search(variable):
            continue
        elif meant := nearest(name, (known for known in names() if "." not in known)):
            raise UserError(variable, "there is no such setting", f"did you mean {PREFIX}{meant.upper()}")
    return settings


def file_settings(file: Path) -> list[Setting]:
    """The settings of a recipe. Raises UserError with file and line for what is not YAML or not a setting."""
    import yaml

    try:
        loader = _as_written()(file.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        refused: list[UserError] = []
        settings = list(_settings(file, loader, root, refused)) if root else []
    except OSError as error:
        raise UserError(str(file), error.strerror or str(error), "give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} byte {error.start}", "not UTF-8 text", "give a YAML file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        change = "correct the line" if file.suffix in (".yaml", ".yml") else f"or is it text: --data {file}"
        raise UserError(f"{file}:{line}", f"not YAML, {error.problem}", change) from None
    except RecursionError:
        raise UserError(
            str(file), "not YAML of settings, it is nested too deeply", "write it flatter"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(str(file), f"not YAML, {error}".replace("\n", " "), "give a YAML file") from None
    if len(refused) == 1:
        raise refused[0]
    if refused:
        listed = " | ".join(map(str, refused))
        raise UserError(str(file), f"{len(refused)} problems: {listed}", "correct them")
    return settings


@cache
def _as_written() -> type[Any]:
    """Reads a plain word as text, unless it is null: what `no`, `012` or `1e-3` means its setting says."""
    import yaml

    class AsWritten(yaml.SafeLoader):
        """Of the words that stand for values it knows null alone."""

    AsWritten.yaml_implicit_resolvers = {}
    for tag in ("bool", "int", "float", "timestamp"):  # written out, as in !!int
        AsWritten.add_constructor(f"tag:yaml.org,2002:{tag}", _text)
    AsWritten.add_implicit_resolver(
        "tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
    )
    return AsWritten


def _text(loader: Any, node: Any) -> Any:
    return loader.construct_scalar(node)


def _settings(file: Path, loader: Any, root: Any, refused: list[UserError]) -> Iterator[Setting]:
    """The settings of a file, in sections or flat. What is none is added to `refused`."""
    for name, node, where in _items(file, loader, root):
        try:
            if name not in sections():
                yield _flat(loader, name, node, where)
            elif node.id != "mapping":
                yield from _shorthand(loader, name, node, where)
        except UserError as error:
            refused.append(error)
        if name not in sections() or node.id != "mapping":
            continue
        for field, value, line in _items(file, loader, node):
            found = _in_section(name, field, loader.construct_object(value, deep=True), line)
            if found is None:
                refused.append(_unknown(line, field, name))
            else:
                yield found


def _flat(loader: Any, name: str, node: Any, where: str) -> Setting:
    """A setting that stands in no section, as in `learning_rate: 1e-3`."""
    found = setting(name, loader.construct_object(node, deep=True), where)
    if found is None:
        raise _unknown(where, name)
    return found


def _items(file: Path, loader: Any, node: Any) -> Iterator[tuple[str, Any, str]]:
    """(key, value node, `file:line`) of a mapping; refuses what is no mapping, and a key written twice."""
    where = f"{file}:{node.start_mark.line + 1}"
    if node.id != "mapping":
        raise UserError(where, "not a mapping of keys to values", "write sections, as in `train:`")
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        where = f"{file}:{key_node.start_mark.line + 1}"
        if key in seen:
            raise UserError(where, f"{key} is already set at {seen[key]}", "keep one of the two")
        seen[key] = where
        yield key, value_node, where


def _shorthand(loader: Any, section: str, node: Any, where: str) -> Iterator[Setting]:
    value = loader.construct_object(node, deep=True)
    primary = sections()[section].primary
    if value is None:
        return
    if not primary:
        raise UserError(where, f"{section} is given as {value!r}", f"write keys below `{section}:`")
    yield Setting(section, primary, value, where)


def _in_section(section: str, field: str, value: Any, origin: str) -> Setting | None:
    """The setting, by any of its names, but only in the section it belongs to."""
    name = field.replace("-", "_")
    found = setting(f"{section}.{name}", value, origin)
    fact = names().get(name)
    if fact and fact.section == section and not (fact.primary and name == section):
        found = setting(name, value, origin)
    return found


def _unknown(where: str, key: str, section: str = "") -> UserError:
    def show(meant: str) -> str:
        if meant in sections() or "." in meant or not section or names()[meant].section == section:
            return meant
        return f"{meant} in {names()[meant].section}"

    asked = f"{where} {section}.{key}" if section else f"{where} {key}"
    known = names() if section else [*sections(), *names()]
    return unknown(asked, key.replace("-", "_"), known, show, "`shoal config show` lists the settings")
