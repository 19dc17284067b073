"""Tests of the `prepare` benchmark: all methods write the same for a clip, and each is timed."""

import argparse
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.media import load_audio, load_frames


@pytest.fixture
def prepare(benchmarks, monkeypatch):
    import prepare

    monkeypatch.setattr(prepare, "SECONDS", 2)
    return prepare


def test_the_baseline_makes_what_we_make(prepare, tmp_path):
    prepare.make_clips(tmp_path, 1)
    clip = str(tmp_path / "0.mp4")
    subprocess.run([sys.executable, "-c", prepare.PYAV_LOOP, clip, str(tmp_path), "90"], check=True)
    samples, rate = soundfile.read(tmp_path / "sound.flac")
    expected = load_audio(clip)
    assert rate == 16_000 and len(samples) == pytest.approx(len(expected), abs=2048)  # AAC's last frame
    assert np.corrcoef(samples[:30_000], expected[:30_000])[0, 1] > 0.95  # two resamplers
    for second, frame in enumerate(load_frames(clip, [0.0, 1.0])):
        with Image.open(tmp_path / f"{second}.jpg") as image:
            assert image.size == (160, 90)
            assert np.abs(np.asarray(image, float) - np.asarray(frame.resize(image.size), float)).mean() < 12


def test_every_way_is_timed(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "media").mkdir()
    prepare.make_clips(tmp_path / "media", 1)
    case = prepare.measure(tmp_path / "media", argparse.Namespace(frame_size=90, repeats=1))
    assert case["clips"] == 1 and case["baseline"] in case["figures"] and "prepare" in case["figures"]
    for own in case["figures"].values():
        assert own["clips_a_second"]["median"] == pytest.approx(1 / own["seconds"]["median"])
