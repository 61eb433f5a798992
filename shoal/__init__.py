"""Data-parallel training of language models: many replicas, one model."""

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What torchao says when it is imported, by transformers for example: of parts for other machines that it cannot load,
# and of its own use of torch. Nobody can do anything about it.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in str(record.msg))

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
