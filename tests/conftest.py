"""What tests of every folder share: processes that have torch imported, and a small prepared corpus."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from laws.launches import MODEL, shoal
from laws.pool import Pool

SLOW = Path(__file__).with_name("slow.txt").read_text().splitlines()  # tests that take long and rarely break


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests. What `slow.txt` names must be there: a test of another name would run unnoticed."""
    found = {item.nodeid for item in items}
    whole = {name.split("[")[0] for name in found}
    unknown = [name for name in SLOW if name not in found and name.split("[")[0] in whole]
    if unknown and not any("::" in word for word in asked_for(items)):
        raise pytest.UsageError(f"tests/slow.txt names tests that are not there: {', '.join(unknown)}")
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker("slow")


def asked_for(items: list[pytest.Item]) -> list[str]:
    """The files, folders and tests that pytest was asked for."""
    return list(items[0].config.args) if items else []


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on the draw of the one before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Worlds of 1 to 4 ranks, at once: `pool.world(ranks, function, ...)`."""
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def data(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name the corpus and a tiny model for it."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"net {i} " + "the fish swim, the tide goes out " * (12 + i))
    words = ["--data", str(folder), "--cache-dir", str(tmp_path_factory.mktemp("cache")), *MODEL]
    prepared = pool.alone(shoal, ["prepare", *words])
    assert prepared.code == 0, prepared.output
    return words
