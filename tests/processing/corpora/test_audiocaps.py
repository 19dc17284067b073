"""AudioCaps: CSV files, and media under common names of downloads."""

import csv
import logging
from collections import Counter
from pathlib import Path

import pytest

from dali_llava.processing.corpora import load_corpus


HEADER = "audiocap_id,youtube_id,start_time,caption\n"


@pytest.fixture
def load(tmp_path):
    """Write `test.csv` and empty media, and load the split."""

    def load(content: str, *media: str, split: str | None = "test", **options):
        (tmp_path / "media").mkdir(exist_ok=True)
        (tmp_path / "test.csv").write_text(content, encoding="utf-8")
        for name in media:
            (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "media" / name).touch()
        options = {"csv": tmp_path, "data_dir": tmp_path / "media"} | options
        return load_corpus("audiocaps", split, cache_dir=tmp_path / "cache", **options)

    return load


@pytest.mark.parametrize(("split", "clips", "captions"), [("test", 975, 4875), ("val", 495, 2475)])
def test_the_published_splits_keep_every_reference(split, clips, captions, shared_data, tmp_path):
    folder = shared_data / "audiocaps"
    if not folder.is_dir():
        pytest.skip("the CSVs of AudioCaps (../shared/data/audiocaps) are not here")
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    for line in published:
        (tmp_path / f"Y{line['youtube_id']}.wav").touch()
    corpus = load_corpus("audiocaps", split, csv=folder, data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert len(corpus) == clips
    pairs = [(row["id"], caption) for row in corpus for caption in row["captions"]]
    expected = [(f"{line['youtube_id']}_{line['start_time']}", line["caption"]) for line in published]
    assert len(pairs) == captions and Counter(pairs) == Counter(expected)
    assert corpus["id"] == list(dict.fromkeys(clip for clip, _ in expected))
    if split == "test":
        assert sum(len(set(row["captions"])) < 5 for row in corpus) == 97
        assert corpus[0]["id"] == "7fmOlUlwoNg_20"
        assert corpus[0]["captions"][0] == "Constant rattling noise and sharp vibrations"


def test_a_row(load, tmp_path):
    lines = [
        "1,abcdefghijk,30,A dog barks",
        "2,-bcdefghijk,0,Rain",
        "9,abcdefghijk,30, A dog barks ",
        "4,abcdefghijk,30,Ünd",
    ]
    corpus = load(HEADER + "\n".join(lines), "deep/abcdefghijk_30.wav", "-bcdefghijk.mp4")
    assert corpus.to_list() == [
        {
            "id": "abcdefghijk_30",
            "audio": {"path": str(tmp_path / "media/deep/abcdefghijk_30.wav"), "bytes": None},
            "frames": [],
            "captions": ["A dog barks", "A dog barks", "Ünd"],
            "labels": [],
            "start": 0.0,
            "end": None,
            "source": "audiocaps",
        },
        {
            "id": "-bcdefghijk_0",
            "audio": {"path": str(tmp_path / "media/-bcdefghijk.mp4"), "bytes": None},
            "frames": [{"path": str(tmp_path / "media/-bcdefghijk.mp4"), "bytes": None}],
            "captions": ["Rain"],
            "labels": [],
            "start": 0.0,
            "end": None,
            "source": "audiocaps",
        },
    ]


@pytest.mark.parametrize(
    "name",
    [
        "{}_30.wav",
        "{}_30.0.flac",
        "Y{}_30.000.OGG",
        "{}_30000_40000.mp3",
        "{}_000030.m4a",
        "a/b/Y{}_30.mkv",
        "{}_30.webm",
    ],
)
@pytest.mark.parametrize("whole_videos", [False, True])
def test_a_name_with_a_start_holds_the_clip_alone(name, whole_videos, load):
    (row,) = load(
        HEADER + "1,abcdefghijk,30,Rain", name.format("abcdefghijk"), "abcdefghijk_31.wav", whole_videos=whole_videos
    )
    assert row["audio"]["path"].endswith(name.format("abcdefghijk"))
    assert (row["start"], row["end"]) == (0.0, None)


@pytest.mark.parametrize("name", ["abcdefghijk.wav", "x/Yabcdefghijk.mp4"])
@pytest.mark.parametrize(("whole_videos", "segment"), [(False, (0.0, None)), (True, (30.0, 40.0))])
def test_a_bare_name_is_a_clip_or_the_whole_video(name, whole_videos, segment, load):
    (row,) = load(HEADER + "1,abcdefghijk,30,Rain", name, whole_videos=whole_videos)
    assert row["audio"]["path"].endswith(name)
    assert (row["start"], row["end"]) == segment


@pytest.mark.parametrize(
    ("media", "whole_videos", "sound", "picture"),
    [
        (["K.wav", "K.mp4", "K.jpg"], False, "K.wav", "K.mp4"),
        (["K.wav", "K.jpg"], False, "K.wav", "K.jpg"),
        (["K_30.wav", "K.mp4"], False, "K_30.wav", "K.mp4"),
        (["K_30.wav", "K.mp4"], True, "K_30.wav", None),  # the video is not cut to the clip, unlike the sound
        (["K.wav", "K_30.png"], True, "K.wav", None),
        (["b/K.wav", "a/K.flac"], False, "a/K.flac", None),
    ],
)
def test_sound_comes_from_sounds_and_frames_from_videos(media, whole_videos, sound, picture, load):
    (row,) = load(HEADER + "1,K,30,Rain", *media, whole_videos=whole_videos)
    assert row["audio"]["path"].endswith(f"/{sound}")
    assert [Path(frame["path"]).name for frame in row["frames"]] == ([] if picture is None else [picture])


def test_missing_media(load, caplog):
    content = HEADER + "1,abcdefghijk,30,Rain\n2,bbcdefghijk,0,Wind"
    with caplog.at_level(logging.INFO):
        assert load(content, "bbcdefghijk.wav")["id"] == ["bbcdefghijk_0"]
    assert [record.message for record in caplog.records if "media" in record.message] == [
        "audiocaps test: 1 of 2 clips have media"
    ]
    kept = load(content, missing="keep")
    assert [(row["audio"] is None, row["start"], row["end"]) for row in kept] == [(True, 30, 40), (False, 0, None)]
    with pytest.raises(
        FileNotFoundError, match=r"test: 1 of 2 clips have no media in .*, first 'abcdefghijk_30'; add"
    ):
        load(content, missing="error")
    assert load(content, missing="keep", data_dir=None)["audio"] == [None, None]
    with pytest.raises(FileNotFoundError, match="none of 1 clips has media in .*; check data_dir= and its file names"):
        load(HEADER + "1,abcdefghijk,30,Rain")


def test_new_media_and_new_captions_are_seen_at_the_next_load(load):
    content = HEADER + "1,abcdefghijk,30,Rain\n2,bbcdefghijk,0,Wind\n"
    assert len(load(content, "abcdefghijk.wav")) == 1
    assert len(load(content, "bbcdefghijk.wav")) == 2
    assert load(content + "3,bbcdefghijk,0,A breeze\n")[1]["captions"] == ["Wind", "A breeze"]
    assert len(load(content)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "id,youtube_id,start_time,caption\n",
            r"csv, line 1: expected the columns audiocap_id, .*; found id, youtube",
        ),
        ("", "line 1: expected the columns .*; found none"),
        (HEADER, "contains no clips"),
        (HEADER + "1,abcdefghijk,30,Rain\n2,abcdefghijk,30,  \n", "line 3: caption is empty; fill it in"),
        (HEADER + "1,,30,Rain\n", "line 2: youtube_id is empty"),
        (HEADER + "1,abcdefghijk,soon,Rain\n", "line 2: start_time 'soon' is not a number of seconds"),
        (HEADER + "1,abcdefghijk,-1,Rain\n", "line 2: start_time '-1' is not a number of seconds"),
        (HEADER + "1,abcdefghijk,nan,Rain\n", "line 2: start_time 'nan' is not a number of seconds"),
        (HEADER + "2,abcdefghijk,30,Rain, wind\n", "line 2: does not have 4 cells"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(content, message, load):
    with pytest.raises(ValueError, match=message):
        load(content, "abcdefghijk.wav")


def test_a_torn_row_is_named_and_the_rest_is_read(load, caplog):
    """A row split by a line break, as in the train list of AudioCaps 2.0, and a row with an unquoted comma."""
    quoted = '1,abcdefghijk,30,"Rain\nand wind"\n'
    rows = load(
        HEADER + quoted + "2,abcdefghijk,30,Rain, wind\n3,abcdefghijk,30,A man\nspeaks,,,\n", "abcdefghijk.wav"
    )
    assert rows["captions"] == [["Rain\nand wind", "A man"]]
    torn = [record.getMessage() for record in caplog.records if "torn row" in record.getMessage()]
    assert len(torn) == 2
    assert "test.csv, line 4: skipped a torn row (5 cells instead of 4); quote" in torn[0]
    assert "test.csv, line 6: skipped a torn row (youtube_id and start_time are empty); quote" in torn[1]


def test_a_column_that_is_there_twice_is_named(load):
    with pytest.raises(ValueError, match="test.csv, line 1: the column 'caption' appears twice; rename one"):
        load(HEADER.strip() + ",caption\n1,abcdefghijk,30,Rain,Wind\n", "abcdefghijk.wav")


def test_bad_options(load, tmp_path):
    content = HEADER + "1,abcdefghijk,30,Rain"
    with pytest.raises(ValueError, match="missing must be one of skip, keep, error, not 'drop'"):
        load(content, "abcdefghijk.wav", missing="drop")
    with pytest.raises(ValueError, match="audiocaps needs data_dir=, the folder of its media"):
        load(content, data_dir=None)
    with pytest.raises(ValueError, match="audiocaps needs csv=, the file test.csv or its folder"):
        load(content, csv=None, data_dir=None)
    with pytest.raises(FileNotFoundError, match=r"absent: no such file or folder; check data_dir= of audiocaps"):
        load(content, data_dir=tmp_path / "absent")
    with pytest.raises(ValueError, match="is a file; set data_dir= of audiocaps to the folder of the media"):
        load(content, data_dir=tmp_path / "test.csv")
    with pytest.raises(FileNotFoundError, match=r"val.csv: no such file; pass csv="):
        load(content, split="val")
    with pytest.raises(ValueError, match="test.csv: one file contains one split; select the split"):
        load(content, split=None, csv=tmp_path / "test.csv")
    (tmp_path / "test.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"test.csv: is not a CSV file in UTF-8 "):
        load_corpus("audiocaps", "test", csv=tmp_path, data_dir=tmp_path, cache_dir=tmp_path)
