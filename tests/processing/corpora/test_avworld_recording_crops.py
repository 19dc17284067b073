"""Crops of recordings: those that a class of AVWorld plays, and those of the tests."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from dali_llava.processing.corpora.avworld import recordings
from dali_llava.processing.corpora.avworld.recordings import (
    CATEGORIES,
    LARGEST_SPEED,
    REVERBERANT,
    recorded_synthesisers,
    sounding_part,
    spread_crops,
)
from dali_llava.processing.corpora.avworld.scenes import Entity, Scene, render_audio
from dali_llava.processing.media import MediaError


RATE = 16000
SIZE = 40960


def tone(frequency: float, seconds: float) -> np.ndarray:
    """A cosine, which is loud from the first sample."""
    return 0.5 * np.cos(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def write(path: Path, *parts: np.ndarray | float) -> Path:
    """A file of sounds and pauses with the given durations in seconds."""
    path.parent.mkdir(exist_ok=True, parents=True)
    sound = [np.zeros(round(part * RATE)) if isinstance(part, float) else part for part in parts]
    soundfile.write(path, np.concatenate(sound), RATE)
    return path


def test_silence_at_the_ends_is_cut_off(tmp_path):
    hum = tone(440, 0.3)
    part = sounding_part(write(tmp_path / "1-1-A.wav", 0.7, 0.004 * tone(90, 0.2), hum, 0.4, hum, 1.1))
    assert part.dtype == np.float32 and part.shape == (RATE,)
    assert np.allclose(part, np.concatenate([hum, np.zeros(6400), hum]), atol=1e-4)
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 0


def test_silent_recordings_are_rejected(tmp_path):
    with pytest.raises(MediaError, match=r"1-1-A.wav: contains only silence; download it again or remove it"):
        sounding_part(write(tmp_path / "1-1-A.wav", 1.0))


def dog_playing(folder: Path, *parts: np.ndarray | float, varied: bool = False):
    """The synthesiser of a dog with one recording in fold 1, which contains these sounds and pauses."""
    for category in CATEGORIES.values():
        for fold in (1, 2, 3, 4):
            path = folder / f"001 - {category}" / f"{fold}-1-A.wav"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    write(folder / "001 - Dog bark" / "1-1-A.wav", *parts)
    return recorded_synthesisers(folder, [1], varied)["dog"]


def test_varied_recordings_play_at_speeds_within_their_range(tmp_path):
    synthesise = dog_playing(tmp_path, tone(1000, 4.0), varied=True)
    rng = np.random.default_rng(0)
    crops = [synthesise(rng, RATE, RATE, 0.0) for _ in range(200)]
    assert all(crop.shape == (RATE,) and crop.dtype == np.float32 for crop in crops)
    frequencies = np.array([np.abs(np.fft.rfft(crop)).argmax() for crop in crops])  # 1 Hz per bin
    speeds = np.log(frequencies / 1000) / np.log(LARGEST_SPEED)  # uniform in [-1, 1]
    assert -1.1 <= speeds.min() < -0.9 and 0.9 < speeds.max() <= 1.1  # steps of 2% are 0.1 on this scale
    assert abs(speeds.mean()) < 0.15 and speeds.var() == pytest.approx(1 / 3, abs=0.08)


def test_some_varied_recordings_are_played_in_a_room(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "LARGEST_SPEED", 1.0)
    clicks = np.zeros(4 * RATE)
    clicks[::4000] = 0.9
    synthesise = dog_playing(tmp_path, clicks, varied=True)
    rng = np.random.default_rng(0)
    filled = np.array([np.mean(np.abs(synthesise(rng, RATE, RATE, 0.0)) > 1e-4) for _ in range(200)])
    assert not ((filled > 0.001) & (filled < 0.1)).any()  # silence between the clicks, or the response of the room
    assert (filled > 0.1).mean() == pytest.approx(REVERBERANT, abs=0.1)


@pytest.mark.parametrize("size", [RATE, SIZE])
def test_a_crop_is_never_silent(tmp_path, size):
    synthesise = dog_playing(tmp_path, 0.5, tone(440, 0.2), 4.0, 0.5 * tone(600, 0.2), 0.1)
    rng = np.random.default_rng(0)
    energies = np.array([np.square(synthesise(rng, size, RATE, 0.0)).sum() for _ in range(200)])
    assert energies.min() >= 0.5 * 0.125 * 3200 * 0.99  # half of the louder tone


def test_a_crop_may_begin_anywhere_in_a_steady_sound(tmp_path):
    ramp = np.linspace(0.9, 1, 4 * RATE)
    synthesise = dog_playing(tmp_path, ramp)
    rng = np.random.default_rng(0)
    crops = [synthesise(rng, RATE, RATE, 0.0) for _ in range(200)]
    assert all(crop.shape == (RATE,) and crop.dtype == np.float32 for crop in crops)
    middles = np.array([crop[RATE // 2] for crop in crops])
    assert middles.min() < 0.92 and middles.max() > 0.98
    assert np.mean(middles < 0.95) == pytest.approx(0.5, abs=0.12)


def test_a_short_recording_stands_once_at_random_places(tmp_path):
    burst = tone(440, 0.25)
    synthesise = dog_playing(tmp_path, 0.3, burst, 0.3)
    rng = np.random.default_rng(0)
    places = []
    for _ in range(50):
        crop = synthesise(rng, RATE, RATE, 0.0)
        nonzero = np.flatnonzero(crop)
        places.append(nonzero[0])
        assert np.allclose(crop[nonzero[0] :][: burst.size], burst, atol=1e-4)
        assert nonzero[-1] < nonzero[0] + burst.size
    assert min(places) < 2000 and max(places) > 10000


def test_a_click_survives_the_fades_of_a_scene(tmp_path):
    synthesise = dog_playing(tmp_path, 0.5, np.array([1.0]), 3.0, np.array([1.0]), 0.5)
    scene = Scene((Entity("dog", "red", 0, (0.5, 1.5)),), "grass", snr=60.0)
    for seed in range(30):
        sound = render_audio(scene, np.random.default_rng(seed), {"dog": synthesise})
        assert np.flatnonzero(np.abs(sound) > 0.85).size == 1  # PEAK is 0.9; the hiss is far below it


def test_crops_spread_over_the_sounding_part(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE)
    path = write(tmp_path / "1-1-A.wav", 0.5, sound, 0.5)
    part = sounding_part(path)
    crops = spread_crops(path)
    assert len(crops) == 3
    for crop, start in zip(crops, (0, (part.size - SIZE) // 2, part.size - SIZE), strict=True):
        assert crop.shape == (SIZE,) and crop.dtype == np.float32
        expected = part[start : start + SIZE]
        assert np.allclose(crop, 0.9 * expected / np.abs(expected).max(), atol=1e-5)
    assert [np.array_equal(*pair) for pair in zip(crops, spread_crops(path), strict=True)] == [True] * 3
    assert np.array_equal(spread_crops(path, count=1)[0], crops[0])


def test_crops_of_a_short_recording_place_it_evenly(tmp_path):
    path = write(tmp_path / "1-1-A.wav", 0.3, np.full(6000, 0.2), 0.3)
    crops = spread_crops(path, count=3, size=10000)
    assert [np.flatnonzero(crop)[[0, -1]].tolist() for crop in crops] == [[4000, 9999], [2000, 7999], [0, 5999]]
    assert all(crop.max() == pytest.approx(0.9) for crop in crops)


def test_a_crop_in_a_pause_gives_way_to_the_nearest_sound(tmp_path):
    hum = tone(440, 0.5)
    path = write(tmp_path / "1-1-A.wav", hum, 5.0, 0.8 * hum)
    first, middle, last = spread_crops(path)
    assert np.allclose(first[: hum.size], 1.8 * hum, atol=1e-3) and not first[hum.size :].any()
    assert np.allclose(last[-hum.size :], 1.8 * hum, atol=1e-3) and not last[: -hum.size].any()
    assert np.abs(middle).max() == pytest.approx(0.9) and 0 < np.count_nonzero(middle) < hum.size


@pytest.mark.parametrize("arguments", [{"count": 0}, {"size": 0}])
def test_crops_need_a_count_and_a_size(tmp_path, arguments):
    with pytest.raises(ValueError, match="both must be at least 1"):
        spread_crops(tmp_path / "1-1-A.wav", **arguments)
