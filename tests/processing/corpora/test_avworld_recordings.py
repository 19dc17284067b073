"""AVWorld with recordings in place of synthesisers."""

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.avworld import avworld, recordings
from dali_llava.processing.corpora.avworld.avworld import AVWorldConfig, make_row
from dali_llava.processing.corpora.avworld.recordings import (
    CATEGORIES,
    find_recordings,
    recorded_synthesisers,
    recordings_hash,
    sounding_part,
    spread_crops,
)


RATE = 16000
SIZE = 40960


def tone(frequency: float, seconds: float) -> np.ndarray:
    """A cosine, which is loud from the first sample."""
    return 0.5 * np.cos(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def frequency_of(name: str, fold: int) -> int:
    """A frequency in Hz for each class and fold, from 340 to 1900."""
    return 300 + 160 * list(CATEGORIES).index(name) + 40 * fold


def write(path: Path, *parts: np.ndarray | float) -> Path:
    """A file of sounds and pauses with the given durations in seconds."""
    path.parent.mkdir(exist_ok=True, parents=True)
    sound = [np.zeros(round(part * RATE)) if isinstance(part, float) else part for part in parts]
    soundfile.write(path, np.concatenate(sound), RATE)
    return path


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """One recording per class and fold: 0.5 s of silence, a tone of 1 s at `frequency_of`, and 1 s of silence."""
    folder = tmp_path_factory.mktemp("tones")
    for number, (name, category) in enumerate(CATEGORIES.items(), 1):
        for fold in (1, 2, 3, 4):
            path = folder / f"{number:03d} - {category}" / f"{fold}-{number}-A.wav"
            write(path, 0.5, tone(frequency_of(name, fold), 1.0), 1.0)
    return folder


@pytest.fixture
def copied(tones, tmp_path) -> Path:
    """A copy of `tones` that a test can damage."""
    return Path(shutil.copytree(tones, tmp_path / "copied"))


@pytest.fixture(scope="module")
def esc10(shared_data) -> Path:
    folder = shared_data / "esc10"
    if not folder.is_dir():
        pytest.skip("ESC-10 (../shared/data/esc10) is not here")
    return folder


def decoded(row: dict) -> np.ndarray:
    return soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0]


def strongest(sound: np.ndarray) -> float:
    """The frequency in Hz at the peak of the spectrum."""
    return float(np.abs(np.fft.rfft(sound)).argmax() * RATE / sound.size)


def test_recordings_are_found_by_class_and_fold(tones):
    found = find_recordings(tones)
    assert list(found) == list(CATEGORIES)
    assert found["waves"] == {fold: [tones / "003 - Sea waves" / f"{fold}-3-A.wav"] for fold in (1, 2, 3, 4)}


def test_folders_go_by_the_name_behind_the_number(copied):
    (copied / "001 - Dog bark").rename(copied / "101 - dog BARK")
    write(copied / "101 - dog BARK" / "2-77-B.WAV", tone(440, 0.5))
    (copied / "101 - dog BARK" / ".DS_Store").write_text("no recording")
    (copied / "README.md").write_text("no folder")
    (copied / "011 - Cow").mkdir()
    assert [path.name for path in find_recordings(copied)["dog"][2]] == ["2-1-A.wav", "2-77-B.WAV"]


def test_what_is_missing_is_named_at_once(copied):
    with pytest.raises(
        FileNotFoundError, match=r"absent: no such folder; give the folder .* '001 - Dog bark' \.\.\. "
    ):
        find_recordings(copied / "absent")
    (copied / "005 - Clock tick" / "3-5-A.wav").unlink()
    (copied / "009 - Rooster" / "4-9-A.wav").unlink()
    with pytest.raises(ValueError, match=r"no recordings of clock in fold 3, rooster in fold 4; give the folder"):
        find_recordings(copied)
    shutil.rmtree(copied / "002 - Rain")
    shutil.rmtree(copied / "006 - Person sneeze")
    message = r"no recordings of rain \('Rain'\), person \('Person sneeze'\); give .* '010 - Fire crackling'"
    with pytest.raises(ValueError, match=message):
        find_recordings(copied)
    with pytest.raises(ValueError, match=message):
        load_corpus("avworld", "val", cache_dir=copied / "cache", recordings=str(copied))
    assert not (copied / "cache").exists()


@pytest.mark.parametrize("name", ["bark.wav", "1-2.wav", "1-2-A.mp3", "one-2-A.wav"])
def test_misnamed_files_are_named(copied, name):
    (copied / "001 - Dog bark" / name).touch()
    with pytest.raises(ValueError, match=rf"001 - Dog bark/{name}: not named FOLD-CLIPID-TAKE.ogg or .wav"):
        find_recordings(copied)


@pytest.mark.parametrize("folds", [(), (0, 1), (5,)])
def test_folds_are_1_to_4(tones, folds):
    with pytest.raises(ValueError, match="folds must be one or more of 1, 2, 3, 4, not"):
        recorded_synthesisers(tones, folds)


def test_draws_depend_on_the_generator_alone(tones):
    synthesise = recorded_synthesisers(tones, (1, 2, 3))["dog"]
    first = synthesise(np.random.default_rng(0), RATE, RATE, 0.0)
    assert np.array_equal(first, synthesise(np.random.default_rng(0), RATE, RATE, 1.0))  # no parameters to shift
    assert np.array_equal(first, pickle.loads(pickle.dumps(synthesise))(np.random.default_rng(0), RATE, RATE, 0.0))
    assert not np.array_equal(first, synthesise(np.random.default_rng(1), RATE, RATE, 0.0))


@pytest.mark.parametrize(
    ("split", "folds"), [("train", {1, 2, 3}), ("val", {1, 2, 3}), ("test", {4}), ("test_shifted", {4})]
)
def test_splits_keep_to_their_folds(tones, split, folds, monkeypatch):
    monkeypatch.setattr(recordings, "LARGEST_SPEED", 1.0)  # the frequency of a tone identifies its fold
    synthesisers = AVWorldConfig(recordings=tones).synthesisers(split)
    heard = []
    for index in range(40):
        row = make_row(split, index, 0, synthesisers)
        if len(row["labels"]) == 1 and row["labels"][0] in CATEGORIES:
            frequency = strongest(decoded(row))
            candidates = {fold: frequency_of(row["labels"][0], fold) for fold in (1, 2, 3, 4)}
            fold = min(candidates, key=lambda fold: abs(candidates[fold] - frequency))
            assert frequency == pytest.approx(candidates[fold], abs=3)
            heard.append(fold)
    assert len(heard) >= 10 and set(heard) == folds


def test_recordings_change_the_sound_alone(tones):
    synthesisers = AVWorldConfig(recordings=tones).synthesisers("val")
    assert set(synthesisers) == set(CATEGORIES)
    changed = 0
    for index in range(12):
        plain, recorded = make_row("val", index), make_row("val", index, 0, synthesisers)
        assert {**plain, "audio": None} == {**recorded, "audio": None}
        assert (plain["audio"] != recorded["audio"]) == bool(set(plain["labels"]) & set(CATEGORIES))
        changed += plain["audio"] != recorded["audio"]
    assert 4 <= changed <= 11


@pytest.mark.parametrize(("split", "solo"), [("train", True), ("balanced", True), ("val", False), ("test", False)])
def test_recordings_mostly_sound_alone_where_they_are_trained_on(tones, tmp_path, split, solo):
    options = {"sizes": {split: 100}, "cache_dir": str(tmp_path)}
    recorded = load_corpus("avworld", split, recordings=str(tones), **options)["labels"]
    plain = load_corpus("avworld", split, **options)["labels"]
    assert (recorded == plain) != solo
    beside = [labels for labels in recorded if len(labels) > 1 and set(labels) & set(CATEGORIES)]
    assert solo or beside
    if solo:
        with_recordings = [labels for labels in recorded if set(labels) & set(CATEGORIES)]
        assert sum(len(labels) == 1 for labels in with_recordings) > 0.85 * len(with_recordings) > 60


def test_load_corpus_plays_recordings_in_any_number_of_processes(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(avworld, "SHARD_SIZE", 4)
    options = {"sizes": {"test": 10}, "recordings": str(tones)}
    one = load_corpus("avworld", "test", cache_dir=str(tmp_path / "one"), **options)
    two = load_corpus("avworld", "test", cache_dir=str(tmp_path / "two"), num_proc=2, **options)
    synthesisers = recorded_synthesisers(tones, [4])
    assert one.to_list() == two.to_list() == [make_row("test", index, 0, synthesisers) for index in range(10)]


def test_cache_key(copied):
    def key(**options) -> str:
        return AVWorldConfig(**options).create_config_id(options)

    options = json.dumps([0, {"val": 300}, avworld.content_hash(), ""])
    plain = f"avworld-{hashlib.sha256(options.encode()).hexdigest()[:16]}"
    assert key(splits="val") == key(splits="val", recordings=None) == plain
    recorded = key(splits="val", recordings=copied)
    assert recorded != plain
    assert key(splits="captioner", recordings=copied) == key(splits="captioner")  # it contains no sound
    moved = copied.rename(copied.with_name("moved"))
    assert key(splits="val", recordings=f"{moved}/") == recorded
    write(moved / "001 - Dog bark" / "1-1-A.wav", tone(440, 0.7))
    longer = recordings_hash(moved)
    (moved / "001 - Dog bark" / "1-1-A.wav").rename(moved / "001 - Dog bark" / "1-1-B.wav")
    assert len({recorded, longer, recordings_hash(moved)}) == 3


def test_esc10_is_read(esc10):
    found = find_recordings(esc10)
    assert {name: [len(found[name][fold]) for fold in (1, 2, 3, 4)] for name in found} == {
        name: [8, 8, 8, 8] for name in CATEGORIES
    }
    for name, folds in found.items():
        path = folds[4][0]
        assert 0.2 < sounding_part(path).size / RATE < 5.1, name
        for crop in spread_crops(path):
            assert crop.shape == (SIZE,) and np.abs(crop).max() == pytest.approx(0.9)


def test_rows_with_esc10(esc10):
    synthesisers = AVWorldConfig(recordings=esc10).synthesisers("test")
    for index in range(8):
        sound = decoded(make_row("test", index, 0, synthesisers))
        assert sound.shape == (SIZE,) and np.abs(sound).max() == pytest.approx(0.9, abs=1e-3)
