"""What tests of every folder share: real processes that wait with torch imported."""

from collections.abc import Iterator

import pytest
from laws.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Worlds of 1 to 4 ranks, at once: `pool.world(ranks, function, ...)`."""
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()
