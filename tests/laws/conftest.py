"""A small prepared corpus for the tests that launch `shoal`."""

import pytest
from laws.launches import MODEL, shoal
from laws.pool import Pool


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
