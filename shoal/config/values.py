"""How people write values, alike in files, flags and the environment: `10M`, `2e9`, `1e-3`, `a,b`, `ddp`.

Every function here takes what was written and returns the value, or raises ValueError with a sentence that
begins with "should", which ends up behind the name of the setting.
"""

import os
import re
from collections.abc import Callable
from decimal import Decimal
from glob import has_magic, iglob
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from shoal.config.optimizers import OPTIMIZER_ALIASES, OPTIMIZERS

_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([kKMGBT]?)")
MOST_COMMAS = 16  # tried in a file's name, where others are named beside it
BEYOND = 10**18  # nobody counts so far, and arithmetic with more would take its time
MOST_DIGITS = 290  # of a number as it is written: a float holds it times the largest unit
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def number(given: Any) -> Any:
    """`1e-3`, `0.5`, `10M` as a float; what is not text passes through, except true and false."""
    exact = _decimal(given, "a number, such as 1e-3, 0.5 or 10k")
    return float(exact) if exact is not None else given


def whole_number(given: Any) -> Any:
    """`42`, `10k`, `2e9`, `1B` as an int; what is not text passes through, except true and false."""
    wanted = "a whole number, such as 1000, 10k or 2e9"
    exact = _decimal(given, wanted)
    if exact is not None and exact != exact.to_integral_value():
        raise ValueError(f"should be {wanted}")
    value = given if exact is None else int(exact)
    if isinstance(value, int) and abs(value) >= BEYOND:
        raise ValueError("should be below 10^18")
    return value


def _decimal(given: Any, wanted: str) -> Decimal | None:
    if not isinstance(given, str | bool):
        return None
    match = _NUMBER.fullmatch(given.strip()) if isinstance(given, str) else None
    if not match:
        raise ValueError(f"should be {wanted}")
    exact = Decimal(match[1].replace("_", ""))
    if exact.adjusted() > MOST_DIGITS:
        raise ValueError("should be a finite number, and not as large")
    return exact * _UNITS[match[2]]


def names(given: Any) -> Any:
    """`a,b` as a list of names, `none` as an empty one. A list passes through, commas and all."""
    if not isinstance(given, str):
        return given
    parts = [part.strip() for part in given.split(",")]
    return [] if parts == ["none"] else [part for part in parts if part]


def paths(given: Any) -> Any:
    """Names, of which any may be that of a file: `a.txt,Smith, John.txt` is two where the second exists."""
    if isinstance(given, os.PathLike):
        return at_home([given])
    if not isinstance(given, str) or "," not in given or "\0" in given:
        return at_home(names(given))
    if _is_there(given):
        return at_home([given])
    words, found = given.split(","), []
    while words:
        runs = [",".join(words[:count]) for count in range(1, min(len(words), MOST_COMMAS) + 1)]
        name = next((run for run in runs if _is_there(run.strip())), runs[0])
        found.append(name.strip())
        words = words[name.count(",") + 1 :]
    return at_home([name for name in found if name])


def _is_there(name: str) -> bool:
    """Whether a file or folder has the name, or a pattern finds one."""
    path = os.path.expanduser(name)
    return os.path.lexists(path) or (has_magic(path) and next(iglob(path, recursive=True), None) is not None)


def at_home(path: Any) -> Any:
    """A path with the home folder for a `~` that it begins with; other text, such as a hub name, as it is.

    A list gives a list; from Python paths may come as `Path`.
    """
    if isinstance(path, list | tuple):
        return [at_home(each) for each in path]
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        return text
    if "\0" in text:
        raise ValueError("should hold no NUL character")
    return os.path.expanduser(text)


def plain(given: Any) -> Any:
    """What JSON can say: text, numbers, truth values, and lists and mappings of them."""
    if isinstance(given, list):
        return [plain(each) for each in given]
    if isinstance(given, dict) and all(isinstance(name, str) for name in given):
        return {name: plain(each) for name, each in given.items()}
    if not isinstance(given, str | int | float | None) or (
        isinstance(given, int) and abs(given) > 10**MOST_DIGITS
    ):
        raise ValueError("should be text, a number, true or false, or a list or a mapping of them")
    return given


def _trackers(given: list[str]) -> list[str]:
    unknown = [name for name in given if name != "tensorboard"]
    if unknown:
        raise ValueError("should be tensorboard or none")
    return given


def guess(given: Any) -> Any:
    """Text without a declared type (a model dimension): a number or a truth value if it reads as one.

    So is each text within a list or a mapping.
    """
    if isinstance(given, list):
        return [guess(each) for each in given]
    if isinstance(given, dict):
        return {name: guess(each) for name, each in given.items()}
    if not isinstance(given, str):
        return given
    if given.lower() in TRUTH:
        return TRUTH[given.lower()]
    if given.lower() in ("null", "none"):
        return None
    try:
        return whole_number(given)
    except ValueError:
        pass
    try:
        return number(given)
    except ValueError:
        return given


def renamed(table: dict[str, str]) -> Callable[[Any], Any]:
    """Other tools' words for a choice, in ours; a word that is not in the table passes through."""
    return lambda given: table.get(given, given) if isinstance(given, str) else given


def _precision(given: Any) -> Any:
    if str(given) in ("16-true", "float16"):
        raise ValueError(
            "should not hold parameters in fp16: small updates are lost; use --precision 16-mixed"
        )
    words = {
        "bf16": "bf16-mixed",
        "fp16": "16-mixed",
        "16": "16-mixed",
        "fp8": "fp8-mixed",
        "no": "32-true",
        "fp32": "32-true",
        "32": "32-true",
        "64": "64-true",
    }
    return renamed(words)(str(given) if isinstance(given, int) else given)


def _recompute(given: Any) -> Any:
    truth = {word: "full" if on else "none" for word, on in TRUTH.items()}
    return renamed(truth)(str(given).lower() if isinstance(given, bool | str) else given)


def _warmup(given: float) -> float:
    if given >= 1 and given % 1:
        raise ValueError("should be a whole number of steps, or a share of them below 1")
    return given


def _shares(given: Any) -> Any:
    words = {word: "auto" if on else "off" for word, on in TRUTH.items()} | {"none": "off"}
    text = renamed(words)(str(given).lower() if isinstance(given, bool) else given)
    if isinstance(text, list):
        text = ",".join(str(part) for part in text)
    if text not in ("auto", "off") and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(text)):
        raise ValueError("should be auto, off, or one share a worker such as 3,1")
    return str(text)


def _period(given: Any) -> Any:
    text = str(given).strip().lower().replace(" ", "")
    if text == "end":
        return text
    count = text.removesuffix("tokens")
    wanted = "should be 1 or more steps, a number of tokens such as 100ktokens, or end"
    number = _whole_or(wanted, given if isinstance(given, bool) else count)
    if number < 1:
        raise ValueError(wanted)
    return f"{number}{text[len(count) :]}"


def _workers(given: Any) -> Any:
    return (
        given if given in ("auto", "cpu", "gpu") else _whole_or("should be a number, auto, cpu or gpu", given)
    )


def _threads(given: Any) -> Any:
    wanted = "should be 1 or more, or auto"
    if given == "auto":
        return given
    count = _whole_or(wanted, given)
    if count < 1:
        raise ValueError(wanted)
    return count


def _whole_or(wanted: str, given: Any) -> Any:
    """A whole number. Raises ValueError that says what is `wanted`."""
    try:
        value = whole_number(given)
    except ValueError:
        raise ValueError(wanted) from None
    if not isinstance(value, int | float):
        raise ValueError(wanted)
    return value


Number = Annotated[float, BeforeValidator(number, json_schema_input_type=float | str)]
Whole = Annotated[int, BeforeValidator(whole_number, json_schema_input_type=int | str)]
Warmup = Annotated[Number, AfterValidator(_warmup)]
PathName = Annotated[str, BeforeValidator(at_home, json_schema_input_type=str)]
Paths = Annotated[list[str], BeforeValidator(paths, json_schema_input_type=list[str] | str)]
Plain = Annotated[Any, BeforeValidator(plain)]
Trackers = Annotated[list[str], BeforeValidator(names), AfterValidator(_trackers)]
Optimizer = Annotated[Literal[*OPTIMIZERS], BeforeValidator(renamed(OPTIMIZER_ALIASES))]  # type: ignore[valid-type]
Precision = Annotated[
    Literal["auto", "bf16-mixed", "bf16-true", "16-mixed", "fp8-mixed", "32-true", "64-true"],
    BeforeValidator(_precision),
]
Recompute = Annotated[
    Literal["none", "full", "selective"],
    BeforeValidator(_recompute, json_schema_input_type=Literal["none", "full", "selective"] | bool),
]
Shares = Annotated[str, BeforeValidator(_shares)]
Period = Annotated[str, BeforeValidator(_period, json_schema_input_type=int | str)]
Threads = Annotated[int | Literal["auto"], BeforeValidator(_threads, json_schema_input_type=int | str)]
Device = Annotated[Literal["auto", "cpu", "gpu"], BeforeValidator(renamed({"cuda": "gpu"}))]
Workers = Annotated[
    int | Literal["auto", "cpu", "gpu"], BeforeValidator(_workers, json_schema_input_type=int | str)
]
