"""The typed record of a run: one definition for file, flags, Python, docs and schema."""

from shoal.config.batch import Batch, resolve_batch, resolve_workers, usable_cores
from shoal.config.record import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from shoal.config.resolve import Resolved, dump_yaml, load_config

__all__ = [
    "Batch",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LaunchConfig",
    "LogConfig",
    "ModelConfig",
    "Resolved",
    "RunConfig",
    "StrategyConfig",
    "TrainConfig",
    "dump_yaml",
    "load_config",
    "resolve_batch",
    "resolve_workers",
    "usable_cores",
]
