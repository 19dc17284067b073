"""Fixtures for the caption metrics: a METEOR process shared by all tests, and real captions."""

import csv
import shutil

import pytest

from dali_llava.eval.metrics.meteor_process import MeteorScorer


@pytest.fixture(scope="session")
def meteor():
    """A shared METEOR scorer, because its Java process takes seconds to start."""
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java on the PATH")
    with MeteorScorer() as scorer:
        yield scorer


@pytest.fixture(scope="session")
def audiocaps(shared_data) -> dict[str, list[str]]:
    """The five captions of each clip in the test split of AudioCaps."""
    path = shared_data / "audiocaps" / "test.csv"
    if not path.is_file():
        pytest.skip("AudioCaps' test captions (../shared/data/audiocaps/test.csv) are not here")
    captions: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["youtube_id"], []).append(row["caption"])
    return captions
