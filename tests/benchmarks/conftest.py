"""The benchmarks' scripts, which stand in a folder that is no package."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch) -> Path:
    """The folder of the scripts, from which they can be imported while the test runs."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return folder
