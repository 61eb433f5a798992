"""Flags to settings: `--seed 1`, `--seed=1`, `--train.seed 1`, `--exact`, `--no-exact`, `--exact true`."""

from typing import Any

from shoal.config.names import Fact, Setting, names, setting, unknown
from shoal.errors import UserError

_TRUTH = {"true", "false", "yes", "no", "on", "off", "1", "0"}
# What a flag means when no value follows.
_BARE = {"resume_from_checkpoint": "latest", "gradient_checkpointing": "full"}


def flag_settings(words: list[str]) -> list[Setting]:
    """The settings that the words of a command line give, in their order.

    A setting that is a list takes all words up to the next flag (what a shell makes of `--data corpus/*.txt`)
    and may be repeated. Raises UserError for an unknown flag, a missing value, a word without a flag.
    """
    settings: list[Setting] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(word, "it belongs to no flag", "put a recipe first, and a value behind its flag")
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        fact = names().get(name)
        value: Any
        if fact is None and (denied := _denied(name)) is not None:
            name, value = denied, False
        elif equals:
            value = text
        else:
            value = _value(fact, name, flag, rest)
        found = setting(name, value, f"flag {flag}")
        if found is None:
            raise _unknown(flag, name)
        if fact and fact.takes_many:
            found = _joined(settings, found, fact)
        settings.append(found)
    return settings


def _denied(name: str) -> str | None:
    """`no_exact` denies `exact`."""
    fact = names().get(name.removeprefix("no_")) if name.startswith("no_") else None
    denied = name.removeprefix("no_")
    return denied if fact and (fact.is_yes_or_no or denied in fact.switches) else None


def _value(fact: Fact | None, name: str, flag: str, rest: list[str]) -> Any:
    """Takes the value of a flag off the front of `rest`."""
    follows = bool(rest) and not rest[0].startswith("--")
    if fact and (fact.is_yes_or_no or name in fact.switches):
        return rest.pop(0) if follows and rest[0].lower() in _TRUTH else True
    if fact and fact.takes_many and follows:
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        return values
    if follows:
        return rest.pop(0)
    if fact and fact.field in _BARE:
        return _BARE[fact.field]
    if fact is None and not name.startswith("model."):
        raise _unknown(flag, name)
    raise UserError(flag, "no value follows", f"write {flag} VALUE")


def _joined(settings: list[Setting], found: Setting, fact: Fact) -> Setting:
    """`--data a --data b,c` is `--data a,b,c`."""
    before: list[str] = next(
        (earlier.value for earlier in reversed(settings) if earlier.key == found.key), []
    )
    words = [found.value] if isinstance(found.value, str) else found.value
    values = [*before, *(name for word in words for name in fact.split(word))]
    return Setting(found.section, found.field, values, found.origin)


def _unknown(flag: str, name: str) -> UserError:
    show = lambda meant: f"--{meant.replace('_', '-')}"  # noqa: E731
    return unknown(flag, name, names(), show, "`shoal train --help` lists the flags")
