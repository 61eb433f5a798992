"""What settings and their sections are made of."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


def fact(
    default: Any,
    meaning: str,
    *aliases: str,
    switches: dict[str, tuple[str, str]] | None = None,
    of: str = "",
    **limits: Any,
) -> Any:
    """One setting. A switch is a yes/no name for two of its values: {name: (when on, when off)}.

    `of` names the strategies and codecs, or the verb, that read it, where not every run does.
    """
    extra: dict[str, Any] = {"aliases": list(aliases), "switches": switches or {}, "of": of.split()}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A group of settings. `primary` is the one that a bare `--model X` or `model: X` sets."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)
    primary: ClassVar[str] = ""
