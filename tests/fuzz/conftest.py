"""How many: `pytest tests/fuzz --mutations 500 --launches 30`; the suite takes a few."""

import pytest

DEFAULTS = {"mutations": 40, "launches": 1}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, count in DEFAULTS.items():
        parser.addoption(f"--{name}", type=int, default=count)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, count in DEFAULTS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(metafunc.config.getoption(name, count)))
