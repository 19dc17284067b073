"""The corpus of clips in a folder."""

import json

import pytest

from dali_llava.processing.corpora import load_corpus


@pytest.fixture
def load(tmp_path):
    """Load a folder filled with empty media and a table."""
    folder = tmp_path / "clips"

    def load(*media: str, csv: str | None = None, jsonl: str | list | None = None, **options):
        folder.mkdir(exist_ok=True)
        for name in media:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        if csv is not None:
            (folder / "metadata.csv").write_text(csv, encoding="utf-8")
        if jsonl is not None:
            text = jsonl if isinstance(jsonl, str) else "\n".join(map(json.dumps, jsonl))
            (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
        return load_corpus("folder", "train", data_dir=folder, cache_dir=tmp_path / "cache", **options)

    return load


def test_a_folder_of_videos(load, tmp_path):
    corpus = load("b.mp4", "deep/er/a.MOV", "notes.txt", ".b.mp4", "._b.mp4")
    paths = [f"{tmp_path}/clips/{name}" for name in ("b.mp4", "deep/er/a.MOV")]
    assert corpus.to_list() == [
        {
            "id": clip,
            "audio": {"path": path, "bytes": None},
            "frames": [{"path": path, "bytes": None}],
            "captions": [],
            "labels": [],
            "start": 0.0,
            "end": None,
            "source": "folder",
        }
        for clip, path in zip(("b", "deep/er/a"), paths, strict=True)
    ]


def test_sounds_and_pictures_meet_by_name(load):
    corpus = load("a.wav", "a.jpg", "b.wav", "x/b.png", "c.1.flac", "c.1.mp4", "c.1.png")
    found = {
        row["id"]: [row["audio"]["path"].split("/")[-1], *(frame["path"].split("/")[-1] for frame in row["frames"])]
        for row in corpus
    }
    assert found == {"a": ["a.wav", "a.jpg"], "b": ["b.wav"], "c.1": ["c.1.flac", "c.1.mp4"]}  # x/b has no sound


def test_a_picture_alone_is_a_clip_without_sound(load):
    assert load("a.wav", "b.png")["id"] == ["a"]
    kept = load(missing="keep")
    assert (kept[1]["id"], kept[1]["audio"], len(kept[1]["frames"])) == ("b", None, 1)
    with pytest.raises(FileNotFoundError, match="1 of 2 clips have no media in .*, first 'b'"):
        load(missing="error")


def test_a_table_in_csv(load):
    lines = [
        "file_name,caption,caption_2,caption_10,labels,start,end",
        'x/b.wav,"Rain, and wind",Second,Tenth,"Speech; Male speech, man speaking ",,',
        'a.mp4,Dog,Bark,Woof,"[""Dog, pet""]",1.5,3',
    ]
    corpus = load("a.mp4", "x/b.wav", "left out.wav", csv="\n".join(lines))
    assert corpus["id"] == ["x/b", "a"]
    assert corpus["captions"] == [["Rain, and wind", "Second", "Tenth"], ["Dog", "Bark", "Woof"]]
    assert corpus["labels"] == [["Speech", "Male speech, man speaking"], ["Dog, pet"]]
    assert (corpus["start"], corpus["end"]) == ([0.0, 1.5], [None, 3.0])


def test_a_table_in_json_lines(load):
    rows = [
        {"file_name": "./a.mp4", "captions": ["Dog", "Dog"], "labels": ["Dog; cat"], "end": 2},
        {"id": "b", "captions": None, "start": "1"},
    ]
    corpus = load("a.mp4", "b.wav", jsonl="\n\n".join(map(json.dumps, rows)) + "\n")
    assert corpus["captions"] == [["Dog", "Dog"], []]
    assert corpus["labels"] == [["Dog; cat"], []]
    assert (corpus["start"], corpus["end"]) == ([0.0, 1.0], [2.0, None])


def test_several_clips_of_one_file_have_an_id_each(load):
    corpus = load("long.wav", csv="id,file_name,start,end\none,long.wav,0,5\ntwo,long.wav,5,10\n")
    assert corpus["id"] == ["one", "two"]
    assert len({row["audio"]["path"] for row in corpus}) == 1


def test_a_table_elsewhere(load, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"id": "b", "caption": "Rain"}')
    corpus = load("a.wav", "b.wav", csv="file_name\na.wav\n", metadata=tmp_path / "mine.jsonl")
    assert corpus["captions"] == [["Rain"]]


def test_changes_are_seen_at_the_next_load(load):
    assert len(load("a.wav")) == 1
    assert load("b.wav")["captions"] == [[], []]
    assert load(csv="file_name,caption\na.wav,Rain\n")["captions"] == [["Rain"]]
    assert load(csv="file_name,caption\na.wav,Wind\n")["captions"] == [["Wind"]]
    assert load(csv="file_name,caption,caption_2\na.wav,,Wind\nb.wav,,\n")["captions"] == [["Wind"], []]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name,caption\na.wav,Rain\n",
            "csv, line 2: expected a string for file_name or id; found name, caption; add the name",
        ),
        ("file_name\na.wav\nb.wav\na.flac\n", "line 4: 'a' is also in .*csv, line 2; remove one, or give each"),
        ("id,file_name\nx,a.wav\nx,b.wav\n", "line 3: 'x' is also in .*csv, line 2"),
        ('file_name,caption\na.wav," "\n', r"line 2: caption is \[' '\], expected non-empty strings; fill it in"),
        ('file_name,captions\na.wav,"[""Rain"""\n', "line 2: captions is not a JSON list"),
        ('file_name,captions\na.wav,"[""Rain"", 3]"\n', "line 2: captions is .*, expected non-empty strings"),
        ("file_name,start\na.wav,soon\n", r"line 2: start and end \['soon', None\] are not numbers of seconds"),
        ("file_name,start,end\na.wav,3,3\n", r"line 2: start is 3.0 s and end is 3.0 s; give 0 <= start < end"),
        ("file_name,start\na.wav,-1\n", r"line 2: start is -1.0 s and end is None s"),
        ("file_name,end\na.wav,nan\n", r"line 2: start is 0.0 s and end is nan s"),
        ("file_name\na.wav,Rain, wind\n", "line 2: does not have 1 cells"),
        ("", "folder train: contains no clips"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(content, message, load):
    with pytest.raises(ValueError, match=message):
        load("a.wav", "b.wav", csv=content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a"}\n{"id": b}\n', r"metadata.jsonl, line 2: is not JSON \(.*\); write one object per line"),
        ('\n["a"]\n', r"line 2: expected an object, found \['a'\]"),
        ([{"id": 3}], "line 1: expected a string for file_name or id; found id"),
        (
            [{"id": "a", "captions": ["Rain", " "]}],
            r"line 1: captions is \['Rain', ' '\], expected non-empty strings",
        ),
        ([{"id": "a", "labels": 7}], "line 1: labels is 7, expected non-empty strings"),
        ([{"id": "a", "start": [1]}], r"line 1: start and end \[\[1\], None\] are not numbers"),
    ],
)
def test_bad_json_lines_are_named_with_their_line(content, message, load):
    with pytest.raises(ValueError, match=message):
        load("a.wav", jsonl=content)


def test_bad_options(load, tmp_path):
    with pytest.raises(
        ValueError, match="contains both metadata.csv and metadata.jsonl; remove one, or pass metadata="
    ):
        load("a.wav", csv="file_name\na.wav\n", jsonl=[{"id": "a"}])
    with pytest.raises(FileNotFoundError, match="none of 1 clips has media in .*; the first is 'b'"):
        (tmp_path / "mine.csv").write_text("file_name\nb.wav\n")
        load(metadata=tmp_path / "mine.csv")
    with pytest.raises(ValueError, match="folder needs data_dir=, the folder of the clips"):
        load_corpus("folder", "train", cache_dir=tmp_path)
