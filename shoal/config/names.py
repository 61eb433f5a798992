"""The names that settings go by: `--seed`, `--train.seed`, `--lr`, `--bf16`, `SHOAL_SEED`, `train: seed`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from shoal.config.foreign import instead
from shoal.config.record import RunConfig
from shoal.config.section import Section
from shoal.config.strategies import readers
from shoal.errors import UserError, quoted

SLIP = 0.75  # difflib's ratio from which a name was meant to be another


@dataclass(frozen=True)
class Fact:
    """One setting: where it stands in the record, and its definition there."""

    section: str
    field: str
    info: FieldInfo
    primary: bool

    @property
    def key(self) -> str:
        """`train.seed`"""
        return f"{self.section}.{self.field}"

    @property
    def name(self) -> str:
        """`seed`; for the primary field of a section the name of the section, `model`"""
        return self.section if self.primary else self.field

    @property
    def flag(self) -> str:
        """`--learning-rate`"""
        return "--" + self.name.replace("_", "-")

    @property
    def aliases(self) -> list[str]:
        """The other names it goes by, switches left out."""
        return self._extra["aliases"]

    @property
    def switches(self) -> dict[str, tuple[str, str]]:
        """Yes/no names that stand for two of its values: {name: (value when on, value when off)}."""
        return self._extra["switches"]

    @property
    def readers(self) -> list[str]:
        """The strategies and codecs that read it; empty: every run does."""
        strategies = readers(self.field).split() if self.section == "strategy" else []
        return [*strategies, *self._extra["of"]]

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.info.json_schema_extra
        assert isinstance(extra, dict)
        return extra

    @property
    def takes_many(self) -> bool:
        """Whether it is a list, to be given by commas or repeated."""
        return self.info.annotation == list[str]

    def split(self, word: str) -> list[str]:
        """The values of a list that one word gives, as its type in the record has it."""
        (before, *_) = (rule for rule in self.info.metadata if isinstance(rule, BeforeValidator))
        values: list[str] = before.func(word)  # type: ignore[call-arg]
        return values

    @property
    def is_yes_or_no(self) -> bool:
        """Whether the bare flag means yes."""
        return self.info.annotation in (bool, bool | None)


@dataclass(frozen=True)
class Setting:
    """A value that somebody gave to a setting, and where: `recipe.yaml:7`, `flag --seed`, `SHOAL_SEED`."""

    section: str
    field: str
    value: Any
    origin: str

    @property
    def key(self) -> str:
        """`train.seed`"""
        return f"{self.section}.{self.field}"

    @property
    def asked(self) -> str:
        """How an error speaks of it: `--seed`, `SHOAL_SEED`, `recipe.yaml:7 train.seed`."""
        if self.origin.startswith("flag "):
            return self.origin.removeprefix("flag ")
        return f"{self.origin} {self.key}" if ":" in self.origin else self.origin


@cache
def sections() -> dict[str, type[Section]]:
    """The sections of the record, in its order."""
    return {name: field.annotation for name, field in RunConfig.model_fields.items()}  # type: ignore[misc]


@cache
def facts() -> tuple[Fact, ...]:
    """Every setting of the record, in its order."""
    return tuple(
        Fact(name, field, info, primary=field == section.primary)
        for name, section in sections().items()
        for field, info in section.model_fields.items()
    )


@cache
def names() -> dict[str, Fact]:
    """Every name that a setting goes by, with underscores, to the setting."""
    table = {}
    for fact in facts():
        for name in (fact.key, fact.name, *fact.aliases, *fact.switches):
            assert name not in table, f"two settings are called {name}"
            table[name] = fact
    return table


def setting(name: str, value: Any, origin: str) -> Setting | None:
    """The setting that `name` means (`-` and `_` alike), or None if nothing goes by that name.

    `model.<dimension>` is a setting for every dimension; a switch is translated to the value it stands for.
    """
    name = name.replace("-", "_")
    fact = names().get(name)
    if fact is None:
        section, _, dimension = name.partition(".")
        return Setting("model", dimension, value, origin) if section == "model" and dimension else None
    if name in fact.switches:
        on, off = fact.switches[name]
        value = on if yes_or_no(value, origin) else off
    return Setting(fact.section, fact.field, value, origin)


def yes_or_no(given: Any, origin: str) -> bool:
    """`true`, `no`, `on`, `0` ... as a truth value."""
    try:
        return TypeAdapter(bool).validate_python(given)
    except ValidationError:
        asked = origin.removeprefix("flag ")
        raise UserError(asked, f"{quoted(given)} does not fit", "it should be true or false") from None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which `name` is a slip, if it is one: a letter or two of it (1 is the same)."""
    close = get_close_matches(name, list(known), n=1, cutoff=SLIP)
    return close[0] if close else None


def unknown(
    asked: str, name: str, known: Iterable[str], show: Callable[[str], str], otherwise: str
) -> UserError:
    """The error of a name that is no setting: what takes its place, else of which of the `known` it is a slip."""
    change = instead(name)
    if not change:
        meant = nearest(name, known)
        change = f"did you mean {show(meant)}" if meant else otherwise
    found = "there is no such flag" if asked.startswith("--") else "there is no such setting"
    return UserError(asked, found, change)
