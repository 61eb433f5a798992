"""The strategy that docs/explanation.md adds, a file and a row, trains as all-reduce does, as it stands there."""

import importlib.util
import re
import sys
from pathlib import Path

from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import Record, first_difference, follow

from shoal.config.strategies import STRATEGIES, Traits
from shoal.sync import SYNCS
from shoal.wire.mesh import Mesh

DOCS = Path(__file__).parents[2] / "docs"
STEPS = {"precision": "64-true", "max_steps": 4, "global_batch_size": 8, "per_device_train_batch_size": 2}


def source(page: str) -> str:
    return re.search(r"```python\n(\"\"\"Plain: .*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)[1]


def with_it(mesh: Mesh, folder: str) -> Record:
    """As a file of shoal/sync/ and a row of the table."""
    file = Path(folder, f"plain{mesh.rank}.py")
    file.write_text(source("explanation.md"))
    spec = importlib.util.spec_from_file_location("shoal.sync.plain", file)
    module = sys.modules["shoal.sync.plain"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    STRATEGIES["plain"] = Traits("plain.Plain", sends="gradients")
    SYNCS["plain"] = module.Plain
    return follow(mesh, "allreduce", RowsTask("tied"), strategy="plain", output_dir=folder, **STEPS)


def test_the_strategy_of_the_docs_trains(pool: Pool, tmp_path: Path) -> None:
    ours = pool.world(2, with_it, str(tmp_path))
    theirs = pool.world(2, follow, "allreduce", RowsTask("tied"), output_dir=str(tmp_path / "a"), **STEPS)
    for one, other in zip(ours, theirs, strict=True):
        assert first_difference(one.tensors, other.tensors) is None


def test_both_languages_show_the_same() -> None:
    assert source("explanation.md") == source("zh/explanation.md")
