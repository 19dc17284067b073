"""Recordings as a test split, with the class that the captions of most crops name."""

import numpy as np
import pytest
import soundfile

from dali_llava.eval.avworld.recordings import CROPS, score_recordings
from dali_llava.eval.evaluation import System
from dali_llava.eval.runner import CaptionResult
from dali_llava.processing import SOUND_PROMPT
from dali_llava.processing.corpora.avworld.recordings import CATEGORIES, FOLDS


@pytest.fixture
def folder(tmp_path):
    """One recording of noise per class and fold."""
    rng = np.random.default_rng(0)
    for number, category in enumerate(CATEGORIES.values(), start=1):
        folder = tmp_path / "esc10" / f"{number:03d} - {category}"
        folder.mkdir(parents=True)
        for fold in FOLDS:
            soundfile.write(folder / f"{fold}-{number}-A.wav", 0.1 * rng.standard_normal(80_000), 16_000)
    return tmp_path / "esc10"


class Oracle:
    """A captioner that reads the file name. It is wrong once for dog, twice for rooster, and fails for rain."""

    WRONG = {"dog": 1, "rooster": 2}

    def run(self, samples, out, total):
        samples = list(samples)
        assert len(samples) == total == CROPS * len(CATEGORIES)
        for sample in samples:
            assert sample.audio.shape == (40_960,) and sample.image is None and sample.prompt == SOUND_PROMPT
            category, crop = sample.id.split(" - ")[1].split("/")[0], int(sample.id.split("#")[1])
            source = {name: source for source, name in CATEGORIES.items()}[category]
            caption = "an owl hooting" if crop < self.WRONG.get(source, 0) else f"the {source} and a tree"
            failed = source == "rain"
            yield CaptionResult(sample.id, "audio", None if failed else caption, 0.0, "unreadable" if failed else None)


def test_recall_is_the_share_of_majorities(folder, tmp_path):
    system = System("ot_att", "aligned", "audio", SOUND_PROMPT, prefix=True)
    row = score_recordings(Oracle(), folder, system, seed=3, out=tmp_path)
    assert (row.method, row.stage, row.modality, row.split, row.seed) == (
        "ot_att",
        "aligned",
        "audio",
        "esc10_fold4",
        3,
    )
    assert row.n == 10 and row.metrics["sound_recall"] == 0.8  # rooster and rain are wrong
    assert row.reason["sound_recall"] == "3 crops have no caption (unreadable)"
    assert row.metrics["cider_d"] is None and row.reason["cider_d"]
