"""Fixtures for the tests of the corpora."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Preparing a corpus shows no progress bar."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
