"""What an examination finds."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, whether it will do, and what to change if not."""

    area: str
    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
