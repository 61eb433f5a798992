"""The seams are as small as promised, and what stands behind them is closed."""

import ast
import inspect
import statistics
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest
from laws.strategies import STRATEGIES as ROWS

from shoal.codecs import CODECS, Codec, Subject, make
from shoal.config import StrategyConfig, TrainConfig
from shoal.config.optimizers import OPTIMIZERS
from shoal.config.strategies import STRATEGIES
from shoal.layouts.base import PlacedModel
from shoal.observe.trackers import Tracker
from shoal.optim.optimizers import MAKERS, SCHEDULES
from shoal.sync import SYNCS, Sync
from shoal.tasks import TASKS, Task

PACKAGE = Path(__file__).parents[1] / "shoal"
MOST = 7
TYPICAL = 4
OWNED = {"replica", "run", "progress", "recorder", "observer"}  # whose fields only shoal/training/ may write


def members(seam: type) -> set[str]:
    """The public names of a class body, and of the attributes that its own __init__ sets."""
    found = {name for name in vars(seam) if not name.startswith("_")}
    found |= {name for name in getattr(seam, "__annotations__", {}) if not name.startswith("_")}
    if "__init__" in vars(seam):
        source = textwrap.dedent(inspect.getsource(seam.__init__))
        found |= {
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
            and not node.attr.startswith("_")
        }
    return found


@pytest.mark.parametrize("seam", [Sync, PlacedModel, Codec, Task, Tracker])
def test_a_seam_has_few_members(seam: type) -> None:
    assert len(members(seam)) <= MOST, sorted(members(seam))


def overridden(kind: type, seam: type) -> int:
    """How many members of a seam the class defines itself."""
    return len(vars(kind).keys() & members(seam))


@pytest.mark.parametrize(
    ("seam", "kinds"),
    [
        (Sync, list(SYNCS.values())),
        (Codec, [type(make(StrategyConfig(codec=name), Subject((), ))) for name in CODECS if name != "powersgd"]),
        (Task, [entry.task for name, entry in TASKS.items() if name != "rows"]),
    ],
    ids=["Sync", "Codec", "Task"],
)  # fmt: skip
def test_who_provides_one_overrides_fewer(seam: type, kinds: list[Any]) -> None:
    assert statistics.median(overridden(kind, seam) for kind in kinds) <= TYPICAL


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_no_module_names_a_strategy() -> None:
    """But those of shoal/sync/ and the table. (The name of what a seed is for is none.)"""
    found = []
    for path in modules():
        if path.parent.name == "sync" or path.name == "strategies.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seeds = {
            argument
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "derive_seed"
            for argument in node.args
        }
        found += [
            f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in STRATEGIES and node not in seeds
        ]
    assert not found


def test_every_name_is_in_both_of_its_tables() -> None:
    assert SYNCS.keys() == STRATEGIES.keys()
    assert MAKERS.keys() == OPTIMIZERS.keys()
    assert SCHEDULES.keys() == set(get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation))
    assert CODECS.keys() == set(get_args(StrategyConfig.model_fields["codec"].annotation))


def test_fields_are_written_by_their_owner() -> None:
    """Outside shoal/training/ nobody assigns a field of a replica, a run, its progress or its recorder."""
    found = []
    for path in modules():
        if path.parent.name == "training":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name.lstrip("_") in OWNED:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_few_files_stand_at_the_top() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.suffix == ".py"]) <= 10


def test_every_declared_law_is_asked() -> None:
    """By a test that runs on each row that declares it, or that names the row."""
    asked: set[tuple[int, str]] = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("each_that_keeps", "asks"):
                law, *rows = [each.value for each in node.args if isinstance(each, ast.Constant)]
                by_row = node.func.id == "each_that_keeps" and not node.keywords
                asked |= {(law, row) for row in (ROWS if by_row else rows)}
            elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith(".laws"):
                asked |= {(node.left.value, row) for row in ROWS}
    declared = {(law, name) for name, row in ROWS.items() for law in row.laws | row.own}
    assert sorted(declared - asked) == []


def test_every_strategy_is_in_the_table_of_laws() -> None:
    assert {row.settings["strategy"] for row in ROWS.values()} == set(STRATEGIES)
