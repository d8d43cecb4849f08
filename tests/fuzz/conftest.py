"""Runs that nothing happens to."""

from pathlib import Path

import pytest
import small_runs


@pytest.fixture(scope="module", autouse=True)
def plain(small_and_plain) -> None:
    """All runs here are small."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


class Outcomes(dict):
    """Of runs by their names; a failed test need not print them."""

    def __repr__(self) -> str:
        return "Outcomes()"


@pytest.fixture(scope="module")
def whole(root) -> Outcomes:
    """What each run ends with that nothing happens to."""
    for name in small_runs.COMMANDS:
        small_runs.run(small_runs.config_of(name, root, root / name))
    return Outcomes((name, small_runs.outcome(root / name)) for name in small_runs.COMMANDS)
