"""Data-parallel training of language models: many replicas, one model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "train": "shoal.api",
    "evaluate": "shoal.api",
    "generate": "shoal.api",
    "Summary": "shoal.api",
    "Session": "shoal.session",
    "Trainer": "shoal.trainer",
    "EvalPrediction": "shoal.tasks.callers",
    "RunConfig": "shoal.config",
}

__all__ = [
    "EvalPrediction",
    "RunConfig",
    "Session",
    "Summary",
    "Trainer",
    "__version__",
    "evaluate",
    "generate",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import shoal` stays free of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
