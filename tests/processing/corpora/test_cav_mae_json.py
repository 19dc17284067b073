"""The JSON lists of CAV-MAE."""

import json

import pytest

from dali_llava.processing.corpora import load_corpus


def entry(video_id: str = "a", **changes) -> dict:
    place = "/somewhere/else/set"
    return {
        "video_id": video_id,
        "wav": f"{place}/audio/{video_id}.flac",
        "video_path": f"{place}/images/",
        "labels": "/m/09x0r,/m/05zppz",
    } | changes


@pytest.fixture
def load(tmp_path):
    """Write a list, and empty media in `media`, and load the list."""

    def load(content, *media: str, **options):
        text = content if isinstance(content, str) else json.dumps({"data": content}, indent=1)
        (tmp_path / "list.json").write_text(text)
        (tmp_path / "media").mkdir(exist_ok=True)
        for name in media:
            (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "media" / name).touch()
        options = {"data_dir": tmp_path / "media"} | options
        return load_corpus("cav_mae_json", "train", json=tmp_path / "list.json", cache_dir=tmp_path / "c", **options)

    return load


def test_the_published_sample(shared_data, tmp_path):
    path, labels = (
        shared_data / "cav-mae" / "sample_json_as.json",
        shared_data / "audioset" / "class_labels_indices.csv",
    )
    if not path.is_file() or not labels.is_file():
        pytest.skip("the list of CAV-MAE (../shared/data/cav-mae) or AudioSet's labels are not here")
    published = json.loads(path.read_text())["data"]
    for item in published:
        for name in ("audio/{}.flac", "image_mulframe/frame_0/{}.jpg", "image_mulframe/frame_9/{}.jpg"):
            file = tmp_path / name.format(item["video_id"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    options = {"json": path, "data_dir": tmp_path, "missing": "error", "cache_dir": tmp_path / "cache"}
    corpus = load_corpus("cav_mae_json", "train", labels_csv=labels, **options)
    assert len(corpus) == 100 and corpus["id"] == [item["video_id"] for item in published]
    assert corpus[0] == {
        "id": "--4gqARaEJE",
        "audio": {"path": f"{tmp_path}/audio/--4gqARaEJE.flac", "bytes": None},
        "frames": [
            {"path": f"{tmp_path}/image_mulframe/frame_{second}/--4gqARaEJE.jpg", "bytes": None} for second in (0, 9)
        ],
        "captions": [],
        "labels": ["Domestic animals, pets", "Squeak", "Dog", "Animal"],
        "start": 0.0,
        "end": None,
        "source": "cav_mae_json",
    }
    plain = load_corpus("cav_mae_json", "train", **options)
    assert [",".join(labels) for labels in plain["labels"]] == [item["labels"] for item in published]


def test_paths_of_the_list_hold_where_they_are_there(load, tmp_path):
    for name in ("here/a.flac", "here/frame_3/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    relative = entry(wav="here/a.flac", video_path="here", labels="")
    absolute = entry(wav=f"{tmp_path}/here/a.flac", video_path=f"{tmp_path}/here/", labels="")
    for item in (relative, absolute):
        (row,) = load([item], data_dir=None)
        assert row["audio"]["path"] == f"{tmp_path}/here/a.flac"
        assert [frame["path"] for frame in row["frames"]] == [f"{tmp_path}/here/frame_3/a.jpg"]
        assert row["labels"] == []


@pytest.mark.parametrize(
    ("media", "frames"),
    [
        (["set/audio/a.flac", "set/images/frame_2/a.jpg", "set/images/frame_0/a.jpg"], ["frame_0", "frame_2"]),
        (["audio/a.flac", "images/frame_1/a.jpg"], ["frame_1"]),
        (["a.flac", "frame_4/a.jpg"], ["frame_4"]),
        (["a.flac", "a.jpg"], []),
    ],
)
def test_moved_media_are_found_by_the_end_of_their_path(media, frames, load, tmp_path):
    (row,) = load([entry()], *media)
    assert row["audio"]["path"] == f"{tmp_path}/media/{media[0]}"
    assert [frame["path"].split("/")[-2] for frame in row["frames"]] == frames


def test_missing_sound(load):
    clips = [entry("a"), entry("b")]
    assert load(clips, "audio/b.flac", "images/frame_0/a.jpg")["id"] == ["b"]
    kept = load(clips, missing="keep")
    assert kept[0]["audio"] is None and len(kept[0]["frames"]) == 1
    with pytest.raises(FileNotFoundError, match="1 of 2 clips have no media in .*, first 'a'"):
        load(clips, missing="error")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n{"video_id": }]}', r"list.json, line 2: is not JSON \(Expecting value\); give the list"),
        ("[]", r'list.json: expected \{"data": \[...\]\}; give a list'),
        ('{"data": {}}', r'expected \{"data": \[...\]\}'),
        ([entry(), ["b"]], r"entry 1 of data: expected strings for video_id, wav, video_path, labels; found \['b'\]"),
        (
            [{"video_id": "a", "wav": "a.wav"}],
            "entry 0 of data: expected strings .*; found video_id, wav; complete the entry",
        ),
        ([entry(labels=["x"])], "entry 0 of data: expected strings for"),
        ([entry("a"), entry("b"), entry("a")], "entry 2 of data: video_id 'a' is also in entry 0; remove one"),
        ([], "cav_mae_json train: contains no clips"),
    ],
)
def test_a_bad_list_is_named_with_its_place(content, message, load):
    with pytest.raises(ValueError, match=message):
        load(content, "audio/a.flac")


def test_bad_options(load, tmp_path):
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n")
    with pytest.raises(ValueError, match=r"entry 0 of data: label '/m/05zppz' is not in .*labels.csv; use the same"):
        load([entry()], "audio/a.flac", labels_csv=tmp_path / "labels.csv")
    with pytest.raises(FileNotFoundError, match=r"absent.csv: no such file or folder; check labels_csv="):
        load([entry()], labels_csv=tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="cav_mae_json needs json="):
        load_corpus("cav_mae_json", "train", cache_dir=tmp_path)
