"""Fixture that imports the benchmark scripts, whose folder is not a package."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch) -> Path:
    """The folder of the scripts, added to the import path during the test."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return folder
