"""The builder of AVWorld and `load_corpus`."""

import io
import types

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.avworld import avworld
from dali_llava.processing.corpora.avworld.avworld import (
    CAPTIONED_SPLITS,
    DEFAULT_SIZES,
    SPLITS,
    AVWorld,
    AVWorldConfig,
    make_row,
    scene_of,
)
from dali_llava.processing.corpora.avworld.classes import CLASSES, COLOURS, LOOK_AMBIGUOUS, names


SIZES = {"test": 6, "captioner": 60}


def test_splits_and_default_sizes():
    assert DEFAULT_SIZES == {
        "train": 4000, "train_captioned": 1000, "shots": 64, "balanced": 600, "val": 300, "test": 400,
        "test_shifted": 400, "captioner": 14500,
    }  # fmt: skip


def test_load_corpus_gives_rows_that_decode(tmp_path):
    corpus = load_corpus("avworld", "test", cache_dir=tmp_path, sizes=SIZES)
    assert isinstance(corpus, datasets.Dataset) and len(corpus) == 6
    for index, row in enumerate(corpus):
        assert row == make_row("test", index)
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        assert rate == 16000 and samples.shape == (40960,)
        assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-3)
        frames = [Image.open(io.BytesIO(frame["bytes"])) for frame in row["frames"]]
        assert [(frame.format, frame.mode, frame.size) for frame in frames] == [("PNG", "RGB", (48, 48))] * 4
        assert (row["start"], row["end"], row["source"]) == (0.0, 2.56, "avworld")
        assert len(row["captions"]) == 5 and row["visual_captions"] and row["dialogues"] == []
        assert set(row["labels"]) <= set(CLASSES)
        assert row["seen"] == [n for n in row["labels"] if n in row["visible"] and n not in LOOK_AMBIGUOUS]


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(avworld, "SHARD_SIZE", 4)
    one = load_corpus("avworld", "val", cache_dir=tmp_path / "one", sizes={"val": 10}, seed=5)
    two = load_corpus("avworld", "val", cache_dir=tmp_path / "two", sizes={"val": 10}, seed=5, num_proc=2)
    assert one.to_list() == two.to_list()
    assert one["id"] == [f"val-{index:06d}" for index in range(10)]


def test_rows_depend_on_seed_split_and_index_alone():
    row = make_row("test", 3)
    assert row == make_row("test", 3)
    for other in (make_row("test", 3, seed=1), make_row("val", 3), make_row("test", 4)):
        assert row["audio"]["bytes"] != other["audio"]["bytes"]
        assert row["frames"][0]["bytes"] != other["frames"][0]["bytes"]


def test_splits_share_no_scene():
    scenes = [scene_of(split, index)[0] for split in SPLITS for index in range(64)]
    assert len(set(scenes)) == len(scenes)


def test_which_splits_have_captions():
    for split in SPLITS:
        row = make_row(split, 0)
        assert len(row["captions"]) == (5 if split in CAPTIONED_SPLITS else 0)
        assert bool(row["visual_captions"]) == (split in CAPTIONED_SPLITS or bool(row["dialogues"]))
        assert (row["audio"] is None) == (split == "captioner")
        assert row["labels"]


def test_shots_show_all_that_sounds():
    for index in range(64):
        row = make_row("shots", index)
        assert set(row["labels"]) <= set(row["visible"])
        assert {name for name in row["visible"] if name in CLASSES} == set(row["labels"])


def test_test_shifted_is_noisier_than_test():
    def floor(split: str) -> float:
        """Mean level in dB of the quietest tenth of the 20 ms frames, relative to the loudest frame."""
        levels = []
        for index in range(30):
            samples, _ = soundfile.read(io.BytesIO(make_row(split, index)["audio"]["bytes"]))
            power = np.square(samples.reshape(-1, 320)).mean(axis=1)
            levels.append(10 * np.log10(np.quantile(power, 0.1) / power.max()))
        return float(np.mean(levels))

    assert floor("test_shifted") > floor("test") + 3


def test_captioner_rows(tmp_path):
    corpus = load_corpus("avworld", "captioner", cache_dir=tmp_path, sizes=SIZES)
    assert len(corpus) == 60
    lengths = [len(row["frames"]) for row in corpus]
    assert set(lengths) == {0, 1, 2}
    assert 1 <= lengths.count(0) <= 13 and 5 <= lengths.count(2) <= 25  # 10% and 25% of 60, within 3 sigma
    for row in corpus:
        assert row["audio"] is None and row["captions"] == []
        # A caption, an activity unless all objects are silent, sometimes a question. Three dialogues without picture.
        assert 1 <= len(row["dialogues"]) <= (4 if len(row["frames"]) == 2 else 3)
        assert bool(row["visible"]) == bool(row["frames"])
        assert len(row["visual_captions"]) == (4 if len(row["frames"]) == 1 else 0)


def test_dialogues_about_two_pictures_name_what_either_shows_and_what_could_sound():
    paired = [row for row in (make_row("captioner", index) for index in range(60)) if len(row["frames"]) == 2]
    assert len(paired) > 5
    for index, row in enumerate(paired):
        first, second = (frame["bytes"] for frame in row["frames"])
        assert first != second and len(set(row["visible"])) == len(row["visible"])
        able = [name for name in row["visible"] if name in CLASSES]
        assert len(row["dialogues"]) == (4 if able else 2)
        for number, dialogue in enumerate(row["dialogues"]):
            said = f" {dialogue['answer'].replace(',', ' ,')} "
            for name in row["visible"] if number < 2 else able:
                assert sum(said.count(f" {noun} ") for noun in names(name)) == 1, (index, name, said)
            assert not any(f" {colour} " in said for colour in COLOURS)


def test_cache_key_depends_on_source_and_on_options_that_matter(monkeypatch):
    def key(**options):
        return AVWorldConfig(**options).create_config_id(options)

    assert key(splits=["val"]) == key(splits=("val",), sizes={"test": 5}) == key(splits="val", sizes={"val": 300})
    others = [key(splits=["val"], seed=1), key(splits=["val"], sizes={"val": 5}), key(splits=["test"])]
    monkeypatch.setattr(avworld, "content_hash", lambda: "changed")
    others.append(key(splits=["val"]))
    monkeypatch.undo()
    assert len({key(splits=["val"]), *others}) == 5


def test_content_hash_changes_with_the_source(tmp_path, monkeypatch):
    before = avworld.content_hash()
    (tmp_path / "avworld.py").write_text("changed = True\n")
    monkeypatch.setattr(avworld, "__file__", str(tmp_path / "avworld.py"))
    assert avworld.content_hash.__wrapped__() != before


def test_prepared_splits_are_not_made_again(tmp_path, monkeypatch):
    load_corpus("avworld", "test", cache_dir=tmp_path, sizes=SIZES)

    def fail(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(avworld, "make_row", fail)
    assert len(load_corpus("avworld", "test", cache_dir=tmp_path, sizes=SIZES)) == 6


def test_load_corpus_of_all_splits(tmp_path):
    corpus = load_corpus("avworld", cache_dir=tmp_path, sizes=dict.fromkeys(SPLITS, 2))
    assert isinstance(corpus, datasets.DatasetDict)
    assert {split: len(rows) for split, rows in corpus.items()} == dict.fromkeys(SPLITS, 2)


def test_builder_streams():
    builder = AVWorld(splits=["test"], sizes=SIZES)
    assert isinstance(builder, datasets.GeneratorBasedBuilder)
    rows = list(builder.as_streaming_dataset(split="test"))
    assert [row["id"] for row in rows] == [f"test-{index:06d}" for index in range(6)]
    assert rows[0]["captions"] == make_row("test", 0)["captions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "audioset2"}, r"unknown corpus 'audioset2'; known: avworld"),
        ({"name": "avworld", "split": "dev"}, r"no split 'dev'; known: train, train_captioned, shots"),
        ({"name": "avworld", "sampling": 1}, r"no option 'sampling'; known: recordings, seed, sizes"),
        ({"name": "avworld", "split": "val", "sizes": {"dev": 3}}, r"no split 'dev'; known: train"),
        ({"name": "avworld", "split": "val", "sizes": {"val": 0}}, r"'val' must be a positive integer, not 0"),
        ({"name": "avworld", "split": "val", "seed": -1}, r"seed of AVWorld must be .* not -1"),
    ],
)
def test_bad_requests_name_what_is_known(arguments, message):
    arguments = types.MappingProxyType(arguments)
    with pytest.raises(ValueError, match=message):
        load_corpus(**arguments)
