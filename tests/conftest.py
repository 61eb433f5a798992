"""What tests of every folder share: processes that have torch imported, and a small prepared corpus."""

from collections.abc import Iterator

import pytest
import torch
from laws.launches import MODEL, shoal
from laws.pool import Pool


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
