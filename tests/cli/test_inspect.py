"""`dali-llava inspect`: corpora by name, shards, and errors."""

import json
import re

import pytest
import soundfile

from dali_llava.cli import main
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.shards import ClipSettings
from dali_llava.processing.shards.clip import prepare_clip
from dali_llava.processing.shards.writer import TarShard


TINY_AVWORLD = ["avworld", "--split", "test", "--sizes", '{"test": 6}']


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clips(media_dir, tmp_path):
    """A folder of two good clips, one clip with broken sound, and a table."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("bark.wav", "clip.mp4"):
        (folder / name).symlink_to(media_dir / name)
    (folder / "text.wav").write_text("no sound")
    lines = ["file_name,caption,labels", "bark.wav,A dog <barks>.,dog", "clip.mp4,A tone.,", "text.wav,Nothing.,"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def table(capsys) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())


def figures(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_avworld(tmp_path, capsys):
    assert main(["inspect", *TINY_AVWORLD, "--samples", "4", "--check", "5"]) == 0
    shown = table(capsys)
    assert (shown["clips"], shown["with frames"], shown["captions in total"]) == ("6", "6 (100%)", "30")
    assert shown["durations"] == "2.56 to 2.56 s, median 2.56 s; 0.00427 h in total"
    assert shown["cannot be opened"] == "0 of 5 checked"
    out = tmp_path / "runs" / "inspect" / "avworld-test"
    page = (out / "index.html").read_text()
    assert page.count("<article") == page.count("<audio") == 4 and page.count("<img") == 4 * 4
    assert [soundfile.info(path).duration for path in (out / "media").glob("*.flac")] == [2.56] * 4
    told = figures(out)
    assert told["options"] == {"sizes": {"test": 6}} and (told["corpus"], told["split"]) == ("avworld", "test")
    assert sum(told["labels"].values()) == sum(
        len(row["labels"]) for row in load_corpus("avworld", "test", streaming=True, sizes={"test": 6})
    )


def test_the_same_seed_makes_the_same_page(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["inspect", *TINY_AVWORLD, "--samples", "3", "--seed", seed, "--out", name]) == 0
    files = [
        {path.relative_to(name).as_posix(): path.read_bytes() for path in name.rglob("*") if path.is_file()}
        for name in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    ]
    assert files[0] == files[1]
    ids = [[sample["id"] for sample in figures(tmp_path / name)["samples"]] for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


def test_a_folder_of_clips(clips, tmp_path, capsys):
    assert main(["inspect", "folder", "--data-dir", str(clips)]) == 0
    shown = table(capsys)
    assert (shown["clips"], shown["unknown duration"]) == ("3", "1 (broken 1)")
    assert shown["cannot be opened"] == "1 (broken 1) of 3 checked"
    page = (tmp_path / "runs" / "inspect" / "folder-train" / "index.html").read_text()
    assert "A dog &lt;barks&gt;." in page and "<barks>" not in page and "cannot be opened, broken: " in page


def test_options_are_those_of_prepare(clips, tmp_path):
    words = ["--metadata", str(clips / "metadata.csv"), "--missing", "keep"]
    assert main(["inspect", "folder", "--data-dir", str(clips), *words, "--out", "out"]) == 0
    assert figures(tmp_path / "out")["options"] == {"metadata": str(clips / "metadata.csv"), "missing": "keep"}


def test_shards(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    with open(tmp_path / "shards" / "shard-000000.tar", "wb") as file:  # like `prepare`, but in this process
        shard = TarShard(file)
        for row in load_corpus("avworld", "test", streaming=True, sizes={"test": 5}):
            shard.add(prepare_clip(row, ClipSettings(keep_silent=True, keep_frozen=True)))
        shard.finish()
    index = {"clips": 5, "shards": [{"name": "shard-000000.tar"}]}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
    assert main(["inspect", "shards"]) == 0
    shown = table(capsys)
    assert (shown["clips"], shown["captions in total"], shown["with sound"]) == ("5", "25", "5 (100%)")
    assert (tmp_path / "runs" / "inspect" / "shards-shards" / "index.html").is_file()
    assert main(["inspect", "./shards", "--split", "test"]) == 1
    assert "corpus 'shards' has no split 'test'; known: train" in capsys.readouterr().err


def test_what_cannot_be_inspected_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for words, message in (
        (["nothing"], "unknown corpus 'nothing'; known: avworld, "),
        (["avworld", "--split", "dev"], "corpus 'avworld' has no split 'dev'"),
        (["avworld"], "corpus 'avworld' has several splits; choose --split from train, "),
        (["folder", "--data-dir", "nowhere"], "nowhere: no such file or folder; check data_dir="),
        (["folder", "--data-dir", "empty"], "folder train: contains no clips"),
        (["./empty"], "no such file, so ./empty contains no shards; `dali-llava prepare` writes it"),
        ([*TINY_AVWORLD, "--out", "file"], "file: cannot be written (Not a directory); give --out a folder"),
        ([*TINY_AVWORLD, "--out", "."], "contains other files, which would be lost; give --out a new folder"),
    ):
        assert main(["inspect", *words]) == 1
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(
    "words", [[], ["avworld", "--sizes", "many"], ["avworld", "--colour", "3"], ["avworld", "--samples", "0"]]
)
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *words])
    assert caught.value.code == 2
    assert "usage: dali-llava inspect" in capsys.readouterr().err
