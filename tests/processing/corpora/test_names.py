"""Names of files and clips: matching keys, and reports of unusable names."""

import json
import os
import unicodedata

import pytest

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.names import is_utf8, name_key, printable


COMPOSED, DECOMPOSED = "café à la crème", unicodedata.normalize("NFD", "café à la crème")
CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (COMPOSED + ".wav", DECOMPOSED + ".WAV"),
        (" rain.wav", "rain"),
        ("-0049e.MP4", "-0049e"),
        ("./a/b.flac", "a\\b.mp3"),
        ("v1.2", "v1.2.ogg"),
    ],
)
def test_names_of_one_clip_have_one_key(one, other):
    assert name_key(one) == name_key(other) == unicodedata.normalize("NFC", name_key(one))


def test_names_of_different_clips_have_different_keys():
    assert len({name_key(name) for name in ("a.b", "a", "a/b", "A", "a.txt", "")}) == 6


def test_what_is_not_utf8_is_printed_with_escapes():
    name = os.fsdecode(b"caf\xe9.wav")
    assert not is_utf8(name) and printable(name) == "caf\\xe9.wav"
    assert not is_utf8("cut \ud83d") and printable("cut \ud83d") == "cut \\ud83d"
    assert is_utf8(COMPOSED) and printable(COMPOSED) == COMPOSED


@pytest.fixture
def media(tmp_path):
    """File names as macOS, cameras and users write them, and one that is not UTF-8."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in (DECOMPOSED + ".wav", " leading.wav", "UPPER.WAV", "-dash.wav", "plain.Mp4"):
        (folder / name).touch()
    try:
        (folder / os.fsdecode(b"caf\xe9.wav")).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    return folder


def test_a_folder_reports_a_bad_name_and_takes_the_rest(media, tmp_path, caplog):
    rows = load_corpus("folder", "train", data_dir=str(media), cache_dir=tmp_path / "cache")
    assert sorted(rows["id"]) == sorted([COMPOSED, "leading", "UPPER", "-dash", "plain"])
    assert all(os.path.exists(row["audio"]["path"]) for row in rows)
    assert "media/caf\\xe9.wav: skipped, the file name is not UTF-8; rename the file" in caplog.text


def test_a_table_finds_files_however_either_spells_the_name(media, tmp_path):
    names = [COMPOSED + ".wav", "leading", "upper.wav", "UPPER.wav", "-dash.wav", "plain.mp4"]
    (media / "metadata.csv").write_text("file_name\n" + "\n".join(names) + "\n", encoding="utf-8")
    rows = load_corpus("folder", "train", data_dir=str(media), missing="keep", cache_dir=tmp_path / "cache")
    assert [row["id"] for row in rows if row["audio"] is None or row["audio"]["path"] is None] == ["upper"]


def test_clotho_and_audiocaps_find_them_too(media, tmp_path):
    lines = [f"{name},1,2,3,4,5" for name in (COMPOSED + ".wav", "UPPER.wav", " leading.wav", "-dash.wav")]
    (tmp_path / "list.csv").write_text(CLOTHO + "\n".join(lines), encoding="utf-8")
    options = {"csv": str(tmp_path / "list.csv"), "data_dir": str(media), "missing": "error"}
    rows = load_corpus("clotho", "evaluation", cache_dir=tmp_path / "cache", **options)
    assert rows["id"] == [COMPOSED, "UPPER", "leading", "-dash"]

    header = "audiocap_id,youtube_id,start_time,caption\n"
    (tmp_path / "test.csv").write_text(f"{header}1,-dash,0,Rain\n2,UPPER,0,Rain\n", encoding="utf-8")
    rows = load_corpus("audiocaps", "test", cache_dir=tmp_path / "cache", **options | {"csv": str(tmp_path)})
    assert rows["id"] == ["-dash_0", "UPPER_0"]


def test_a_caption_cut_within_an_emoji_is_named_with_its_line(media, tmp_path):
    lines = ['{"id": "-dash", "captions": ["Rain \\ud83c\\udf27"]}', '{"id": "UPPER", "captions": ["Rain \\ud83c"]}']
    (media / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: a string contains a lone surrogate"):
        load_corpus("folder", "train", data_dir=str(media), cache_dir=tmp_path / "cache")
    (media / "metadata.jsonl").write_text(lines[0])
    (row,) = load_corpus("folder", "train", data_dir=str(media), cache_dir=tmp_path / "cache")
    assert row["captions"] == ["Rain \U0001f327"]


def test_a_list_of_cav_mae_finds_them_too(media, tmp_path):
    entries = [
        {"video_id": name, "wav": f"/gone/{name}.wav", "video_path": "/gone", "labels": "x"}
        for name in (COMPOSED, "UPPER")
    ]
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    options = {"json": str(tmp_path / "list.json"), "data_dir": str(media), "missing": "error"}
    rows = load_corpus("cav_mae_json", "train", cache_dir=tmp_path / "cache", **options)
    assert [os.path.basename(row["audio"]["path"]) for row in rows] == [DECOMPOSED + ".wav", "UPPER.WAV"]
