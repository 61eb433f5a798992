"""The typed record of a run: one definition for file, flags, Python, docs and schema."""

from shoal.config.batch import Batch, resolve_batch
from shoal.config.grid import resolve_grid, team_size
from shoal.config.layout import THERE_AND_BACK, LayoutConfig
from shoal.config.options import check_options
from shoal.config.order import ORDER, Order, first_change, order_of
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

__all__ = [
    "ORDER",
    "THERE_AND_BACK",
    "Batch",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LaunchConfig",
    "LayoutConfig",
    "LogConfig",
    "ModelConfig",
    "Order",
    "Resolved",
    "RunConfig",
    "StrategyConfig",
    "TrainConfig",
    "check_options",
    "dump_yaml",
    "first_change",
    "idle_gpus",
    "load_config",
    "order_of",
    "resolve_batch",
    "resolve_grid",
    "resolve_threads",
    "resolve_workers",
    "team_size",
    "wanted_device",
]
