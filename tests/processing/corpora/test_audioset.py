"""AudioSet: segments, label names and media."""

import csv

import pytest

from dali_llava.processing.corpora import load_corpus


LABELS = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
COMMENTS = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=1, num_segs=1\n# YTID, start_seconds, ...\n"
GOOD = 'abcdefghijk, 30.000, 40.000, "/m/05zppz,/m/09x0r"\n'


@pytest.fixture
def load(tmp_path):
    """Write the segments of `eval`, the labels and empty media, and load the split."""

    def load(content: str, *media: str, labels: str | None = LABELS, **options):
        (tmp_path / "eval_segments.csv").write_text(content)
        if labels is not None:
            (tmp_path / "class_labels_indices.csv").write_text(labels)
        for name in media:
            (tmp_path / name).touch()
        return load_corpus("audioset", "eval", data_dir=tmp_path, cache_dir=tmp_path / "cache", **options)

    return load


def test_the_published_segments_have_the_names_of_their_labels(shared_data, tmp_path):
    folder = shared_data / "audioset"
    if not folder.is_dir():
        pytest.skip("the CSVs of AudioSet (../shared/data/audioset) are not here")
    lines = (folder / "balanced_train_segments.csv").read_text().splitlines()[3:]
    media = tmp_path / "media"
    for number, line in enumerate(lines):
        if number % 1000 == 0:
            (media / str(number)).mkdir(parents=True)
            place = media / str(number)
        (place / f"{line.split(',')[0]}.flac").touch()
    corpus = load_corpus(
        "audioset", "balanced_train", csv=folder, data_dir=media, cache_dir=tmp_path / "cache", missing="error"
    )
    assert len(corpus) == 22160
    assert corpus["id"] == [line.split(",")[0] for line in lines]
    assert corpus[0]["labels"] == ["Speech", "Gush"] and corpus[0]["audio"]["path"] == f"{media}/0/--PJHxphWEs.flac"
    labels = [label for row in corpus["labels"] for label in row]
    with open(folder / "class_labels_indices.csv", newline="") as file:
        assert set(labels) == {row["display_name"] for row in csv.DictReader(file)}
    assert len(labels) == 52882  # num_positive_labels in the header of the CSV file
    lengths = [row["end"] - row["start"] for row in corpus.select_columns(["start", "end"])]
    assert lengths.count(10.0) == 21813 and min(lengths) > 0


def test_a_row(load, tmp_path):
    assert load(COMMENTS + GOOD, "abcdefghijk.wav", "abcdefghijk.jpg").to_list() == [
        {
            "id": "abcdefghijk",
            "audio": {"path": f"{tmp_path}/abcdefghijk.wav", "bytes": None},
            "frames": [{"path": f"{tmp_path}/abcdefghijk.jpg", "bytes": None}],
            "captions": [],
            "labels": ["Male speech, man speaking", "Speech"],
            "start": 0.0,
            "end": 10.0,
            "source": "audioset",
        }
    ]


@pytest.mark.parametrize(
    ("name", "whole_videos", "segment"),
    [
        ("abcdefghijk.mp4", False, (0.0, 7.5)),
        ("abcdefghijk.mp4", True, (30.0, 37.5)),
        ("Yabcdefghijk_30.000.mp4", True, (0.0, 7.5)),
        ("abcdefghijk_30000_37500.wav", True, (0.0, 7.5)),
    ],
)
def test_the_clip_in_its_file(name, whole_videos, segment, load):
    (row,) = load(
        'abcdefghijk, 30.000, 37.500, "/m/09x0r"\n', name, whole_videos=whole_videos
    )  # also without the comments
    assert (row["start"], row["end"]) == segment


def test_rows_without_media_keep_their_place_in_the_video(load):
    (row,) = load(COMMENTS + GOOD, missing="keep")
    assert (row["audio"], row["frames"], row["start"], row["end"]) == (None, [], 30.0, 40.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "abcdefghijk, 30.000, 40.000\n",
            r"line 1: expected the columns YTID, start_seconds, .*; found abcdefghijk, 30",
        ),
        ("youtube_id,start_time,caption,other\n", r"start and end \['start_time', 'caption'\] are not numbers"),
        (
            COMMENTS + "abcdefghijk, 40.000, 40.000, x\n",
            "line 4: 'abcdefghijk' starts at 40 s and ends at 40 s; give 0 <= start",
        ),
        (COMMENTS + "abcdefghijk, -1.000, 40.000, x\n", "line 4: 'abcdefghijk' starts at -1 s and ends at 40 s"),
        (COMMENTS + "abcdefghijk, 0, inf, x\n", "line 4: 'abcdefghijk' starts at 0 s and ends at inf s"),
        (COMMENTS + "abcdefghijk, nan, 1, x\n", "line 4: 'abcdefghijk' starts at nan s and ends at 1 s"),
        (COMMENTS + GOOD + GOOD, r"line 5: 'abcdefghijk' is also in .*csv, line 4; remove one"),
        (COMMENTS + 'abcdefghijk, 0, 1, "/m/09x0r,/m/no"\n', r"line 4: label '/m/no' is not in .*indices.csv; use"),
        (COMMENTS, "audioset eval: contains no clips"),
    ],
)
def test_bad_segments_are_named_with_their_line(content, message, load):
    with pytest.raises(ValueError, match=message):
        load(content, "abcdefghijk.wav")


def test_bad_labels(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"class_labels_indices.csv: no such file; pass labels_csv="):
        load(GOOD, "abcdefghijk.wav", labels=None)
    with pytest.raises(ValueError, match="expected the columns index, mid, display_name; found number, name"):
        load(GOOD, "abcdefghijk.wav", labels="number,name\n")
    (tmp_path / "other.csv").write_text(LABELS)
    assert len(load(GOOD, "abcdefghijk.wav", labels_csv=tmp_path / "other.csv")) == 1
