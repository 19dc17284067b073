"""The page of an inspection: its content, its links, and its atomic writing."""

import errno
import io
import json
import tempfile
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from dali_llava.processing.inspect import page as inspection_page
from dali_llava.processing.inspect.page import bar_chart, to_html, write_page
from dali_llava.processing.inspect.summary import inspect_rows


NASTY = '<script>alert("1 & 2")</script>'


def make_rows(media_dir: Path) -> list[dict]:
    """A clip of a video from 1 to 2.5 s, a sound with text that must be escaped, and a clip without its file."""

    def row(name, audio, frames=(), start=0.0, end=None, captions=(), labels=()):
        files = [{"path": str(path), "bytes": None} for path in (audio, *frames)]
        row = {"id": name, "audio": files[0], "frames": files[1:], "captions": list(captions), "labels": list(labels)}
        return row | {"start": start, "end": end, "source": "made"}

    clip = media_dir / "clip.mp4"
    return [
        row("video", clip, [clip], 1.0, 2.5, ["A tone rises.", "It rises."], ["tone"]),
        row(NASTY, media_dir / "bark.wav", captions=[NASTY], labels=[NASTY, "tone"]),
        row("gone", media_dir / "<gone>.wav", end=1.0),
    ]


@pytest.fixture
def found(media_dir):
    return inspect_rows(make_rows(media_dir))


def lengths(page, out: Path) -> list[float]:
    """Return the lengths in seconds of the sounds of a page. Its pictures are opened too."""
    for name in page.sources():
        if name.endswith(".jpg"):
            Image.open(out / name).load()
    sounds = [soundfile.info(out / name) for name in page.sources() if name.endswith(".flac")]
    return sorted(sound.frames / sound.samplerate for sound in sounds)


def test_page_shows_figures_and_samples(found, media_dir, tmp_path, read_page):
    summary, samples = found
    write_page(tmp_path / "out", "made-test", summary, samples, {"corpus": "made"})
    page = read_page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert page.texts_of("h1") == ["made-test"]
    assert dict(zip(page.texts_of("th"), page.texts_of("td"), strict=True)) == dict(summary.table())
    assert page.count("article") == 3 and set(page.texts_of("h3")) == {"video", NASTY, "gone"}
    assert (page.count("audio"), page.count("img"), page.count("svg")) == (2, 2, 2)
    assert lengths(page, tmp_path / "out") == pytest.approx([1.5, 1.5], abs=0.05)
    assert sorted(page.texts_of("li")) == sorted([NASTY, "A tone rises.", "It rises."])
    shown = page.texts_of("p")
    assert "1 to 2.5 s" in shown and str(media_dir / "clip.mp4") in shown and f"labels: {NASTY}, tone" in shown
    assert f"cannot be opened, missing: {media_dir / '<gone>.wav'}: no such file" in shown


def test_nothing_but_our_own_markup_and_files(found, tmp_path, read_page):
    write_page(tmp_path / "out", NASTY, *found, {})
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    page = read_page(text)
    assert page.count("script") == 0 and "http" not in text and "data:" not in text
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"index.html", "summary.json", *page.sources()}
    assert len(page.sources()) == len(set(page.sources())) == 4


def test_the_figures_as_json(found, tmp_path):
    summary, samples = found
    write_page(tmp_path / "out", "made", summary, samples, {"corpus": "made", "seed": 3})
    figures = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    shown = {sample["id"]: sample["problems"] for sample in figures.pop("samples")}
    assert shown["video"] == shown[NASTY] == [] and shown["gone"][0].startswith("missing: ")
    assert figures == json.loads(json.dumps({"corpus": "made", "seed": 3} | summary.to_dict()))
    assert (figures["clips"], figures["captions"], figures["broken"]) == (3, 3, {"missing": 1})
    assert list(figures["labels"].items()) == [("tone", 2), (NASTY, 1)]


def test_bars_are_as_long_as_their_counts(read_page):
    page = read_page(
        bar_chart([("dog", 1000), ("a label that is far too long for its column", 250), ("<", 0)], "labels")
    )
    bars = [float(attributes["width"]) for tag, attributes in page.elements if tag == "rect"]
    assert bars == [400.0, 100.0, 0.0]
    texts = page.texts_of("text")
    assert texts == ["dog", "1,000", "a label that is far too long for …", "250", "<", "0"]
    assert page.texts_of("title")[1:] == ["a label that is far too long for its column: 250", "<: 0"]


def test_at_most_thirty_labels_are_drawn(media_dir, read_page):
    rows = [make_rows(media_dir)[2] | {"labels": [f"label {number}" for number in range(40)]}]
    page = read_page(to_html("made", *inspect_rows(rows)))
    assert page.count("rect") == 1 + 30


def test_a_page_replaces_an_older_one_whole(found, media_dir, tmp_path, read_page):
    out = tmp_path / "deep" / "out"
    write_page(out, "first", *found, {})
    one = inspect_rows(make_rows(media_dir)[1:2])
    write_page(out, "second", *one, {})
    assert read_page((out / "index.html").read_text()).texts_of("h1") == ["second"]
    assert [path.name for path in (out / "media").iterdir()] == ["000.flac"]
    assert list(out.parent.iterdir()) == [out]


def test_an_older_page_outlives_a_failure(found, tmp_path, monkeypatch):
    write_page(tmp_path / "out", "first", *found, {})
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inspection_page, "to_html", full)
    with pytest.raises(OSError, match=r"out: cannot be written \(No space left on device\); give --out"):
        write_page(tmp_path / "out", "second", *found, {})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_files_are_never_replaced(found, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "media").mkdir()
    with pytest.raises(ValueError, match="mine: contains other files, which would be lost; give --out a new folder"):
        write_page(tmp_path / "mine", "made", *found, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["media"]
    (tmp_path / "empty").mkdir()
    write_page(tmp_path / "empty", "made", *found, {})


def test_a_place_that_cannot_be_written_to_is_named(found, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match=f"{out}: cannot be written"):
            write_page(out, "made", *found, {})

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # root can write anywhere
    with pytest.raises(OSError, match=r"out: cannot be written \(Permission denied\)"):
        write_page(tmp_path / "out", "made", *found, {})


def test_text_that_is_no_unicode(media_dir, tmp_path, read_page):
    row = make_rows(media_dir)[1] | {"id": "caf\udce9"}
    write_page(tmp_path / "out", "made", *inspect_rows([row]), {})
    assert read_page((tmp_path / "out" / "index.html").read_text(encoding="utf-8")).texts_of("h3") == ["caf?"]


def test_a_clip_without_sound_says_so(media_dir, read_page):
    row = make_rows(media_dir)[0]
    for audio, expected in ((row["audio"], 0), (None, 1), ({"path": None, "bytes": None}, 1)):
        page = read_page(to_html("made", *inspect_rows([row | {"audio": audio}])))
        assert (page.texts_of("p").count("no sound"), page.count("audio")) == (expected, 1 - expected)


def test_bytes_are_shown_as_files_are(media_dir, read_page):
    row = make_rows(media_dir)[1]
    content = (media_dir / "bark.wav").read_bytes()
    row |= {"audio": {"path": "inside.wav", "bytes": content}, "start": 30.0}
    summary, (sample,) = inspect_rows([row])
    assert soundfile.info(io.BytesIO(sample.files["flac"])).duration == pytest.approx(1.5)
    assert "from 30 s" in read_page(to_html("made", summary, [sample])).texts_of("p")
