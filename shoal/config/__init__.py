"""The typed record of a run: one definition for file, flags, Python, docs and schema."""

from shoal.config.batch import Batch, resolve_batch
from shoal.config.cache import cache_folder
from shoal.config.grid import resolve_grid, team_size
from shoal.config.layout import THERE_AND_BACK, LayoutConfig
from shoal.config.options import check_options
from shoal.config.record import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from shoal.config.resolve import Resolved, dump_yaml, load_config
from shoal.config.strategy import StrategyConfig
from shoal.config.workers import idle_gpus, resolve_threads, resolve_workers, wanted_device
from shoal.devices import usable_cores

__all__ = [
    "THERE_AND_BACK",
    "Batch",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LaunchConfig",
    "LayoutConfig",
    "LogConfig",
    "ModelConfig",
    "Resolved",
    "RunConfig",
    "StrategyConfig",
    "TrainConfig",
    "cache_folder",
    "check_options",
    "dump_yaml",
    "idle_gpus",
    "load_config",
    "resolve_batch",
    "resolve_grid",
    "resolve_threads",
    "resolve_workers",
    "team_size",
    "usable_cores",
    "wanted_device",
]
