"""Tests of the pre-filter's report: nearest and farthest clips, media, escaping and atomic writing."""

import errno
import random
import re

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from PIL import Image

from dali_llava.processing.corpora.builder import FEATURES
from dali_llava.processing.inspect import clip_page
from dali_llava.train.filtering.page import plot_scores, write_report
from dali_llava.train.filtering.scores import ScoreFolder


NASTY = '<script>alert("1 & 2")</script>'
RED = (214, 39, 40)  # matplotlib's tab:red


def sound_of(index: int) -> np.ndarray:
    """Samples of clip `index`, (1600 + index,) int16, different for each clip."""
    return np.random.default_rng(index).integers(-20_000, 20_000, 1600 + index, dtype=np.int16)


@pytest.fixture
def make_clips(tmp_path):
    """`make_clips(scores, kept)`: clips with audio, three frames of grey level 10 * index and two captions."""

    def make_clips(scores: list[float], kept: int) -> tuple[Dataset, list[dict]]:
        rows, scored = [], []
        (tmp_path / "clips").mkdir(exist_ok=True)
        for index, score in enumerate(scores):
            name = f"clip{index}"
            sound, frame = (tmp_path / "clips" / f"{name}.{extension}" for extension in ("wav", "png"))
            soundfile.write(sound, sound_of(index), 16_000)
            Image.new("RGB", (16, 16), (10 * index,) * 3).save(frame)
            files = [{"path": str(path), "bytes": None} for path in (sound, frame, frame, frame)]
            row = {"id": name, "audio": files[0], "frames": files[1:], "captions": [], "labels": [f"label of {name}"]}
            rows.append(row | {"start": 0.0, "end": None, "source": "made"})
            captions = [f"first of {name}", f"second of {name}"]
            is_kept = score in sorted(scores)[:kept]
            scored.append({"id": name, "score": score, "captions": captions, "labels": row["labels"], "kept": is_kept})
        return Dataset.from_list(rows, features=FEATURES), scored

    return make_clips


@pytest.fixture
def read_report(read_page):
    """`read_report(folder)`: the parsed page, and each of its articles parsed separately."""

    def read_report(folder):
        text = (folder / "index.html").read_text(encoding="utf-8")
        return read_page(text), [read_page(part) for part in re.findall(r"<article.*?</article>", text, re.S)]

    return read_report


def files_of(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_ends_are_shown_in_order_with_their_media(make_clips, read_report, tmp_path, monkeypatch):
    scores = [index / 100 for index in range(25)]
    random.Random(0).shuffle(scores)
    opened = []

    def open_clip(row, *args):
        opened.append(row["id"])
        return clip_page.open_clip(row, *args)

    monkeypatch.setattr("dali_llava.train.filtering.page.open_clip", open_clip)
    write_report(tmp_path / "report", *make_clips(scores, 7), {}, "the 7 nearest")
    page, articles = read_report(tmp_path / "report")

    assert page.texts_of("p")[0] == "7 of 25 scored clips kept: the 7 nearest. Their largest distance is 0.0600."
    assert page.texts_of("h2") == ["Nearest", "Farthest"]
    ranked = [scores.index(score) for score in sorted(scores)]
    shown = ranked[:10] + ranked[::-1][:10]
    assert page.texts_of("h3") == [f"clip{index}" for index in shown] == opened  # no other clip is opened
    for index, article in zip(shown, articles, strict=True):
        told = f"distance {scores[index]:.4f}, {'kept' if scores[index] < 0.07 else 'not kept'}"
        assert article.texts_of("p")[0] == told and f"labels: label of clip{index}" in article.texts_of("p")
        assert article.texts_of("li") == [f"first of clip{index}", f"second of clip{index}"]
        sound, *frames = article.sources()
        samples, rate = soundfile.read(tmp_path / "report" / sound, dtype="int16")
        assert rate == 16_000 and np.array_equal(samples, sound_of(index))
        assert len(frames) == 2  # of three frames, the two captioned ones
        assert np.abs(np.asarray(Image.open(tmp_path / "report" / frames[0]), int) - 10 * index).max() <= 1
    assert set(files_of(tmp_path / "report")) == {"index.html", *page.sources()}


def test_of_few_clips_some_stand_at_both_ends(make_clips, read_report, tmp_path):
    write_report(tmp_path / "report", *make_clips([0.3, 0.1, 0.2], 3), {}, "all")
    page, articles = read_report(tmp_path / "report")
    assert page.texts_of("h3") == ["clip1", "clip2", "clip0", "clip0", "clip2", "clip1"]
    assert [article.sources() for article in articles[:3]] == [article.sources() for article in articles[:2:-1]]
    assert len(list((tmp_path / "report" / "media").glob("*.flac"))) == 3


def test_media_that_cannot_be_opened_are_told_and_the_rest_is_shown(make_clips, read_report, tmp_path):
    rows, scored = make_clips([0.1, 0.2, 0.3], 1)
    (tmp_path / "clips" / "clip0.wav").write_text("no sound at all")
    (tmp_path / "clips" / "clip1.png").unlink()
    write_report(tmp_path / "report", rows, scored, {}, "one")
    _, (first, second, third, *_) = read_report(tmp_path / "report")
    (told,) = [text for text in first.texts_of("p") if text.startswith("cannot be opened, broken: ")]
    assert "clip0.wav" in told and (first.count("audio"), first.count("img")) == (0, 2)
    assert f"cannot be opened, missing: {tmp_path}/clips/clip1.png: no such file" in second.texts_of("p")
    assert (second.count("audio"), second.count("img")) == (1, 0)
    assert (third.count("audio"), third.count("img"), len(third.texts_of("p"))) == (1, 2, 5)


def test_others_text_is_no_markup(make_clips, read_report, tmp_path):
    rows, scored = make_clips([0.1], 1)
    rows = Dataset.from_list([rows[0] | {"id": NASTY, "labels": [NASTY]}], features=FEATURES)
    scored = [scored[0] | {"id": NASTY, "labels": [NASTY], "captions": [NASTY]}]
    write_report(tmp_path / "report", rows, scored, {f"no {NASTY}": f"broken {NASTY}"}, NASTY)
    page, (article, _) = read_report(tmp_path / "report")
    assert page.count("script") == 0 and f"1 of 1 scored clips kept: {NASTY}." in page.texts_of("p")[0]
    assert article.texts_of("h3") == article.texts_of("li") == [NASTY] and f"labels: {NASTY}" in article.texts_of("p")
    assert page.texts_of("h2")[-1] == "Without a score (1)"
    assert (page.texts_of("th"), page.texts_of("td")) == ([f"no {NASTY}"], [f"broken {NASTY}"])


def test_an_older_report_is_replaced_whole(make_clips, read_report, tmp_path):
    out = tmp_path / "out" / "report"
    write_report(out, *make_clips([0.1, 0.2, 0.3], 3), {"clip9": "gone"}, "all")
    write_report(out, *make_clips([0.4], 0), {}, "none")
    page, _ = read_report(out)
    assert page.texts_of("p")[0] == "0 of 1 scored clips kept: none." and page.texts_of("h3") == ["clip0"] * 2
    assert page.texts_of("td") == []
    names = {f"media/{name}" for name in ("histogram.png", "000.flac", "000.0.jpg", "000.1.jpg")}
    assert set(files_of(out)) == {"index.html", *names}
    assert list(out.parent.iterdir()) == [out]


def test_a_report_that_fails_leaves_the_older_one_and_no_list(make_clips, tmp_path, monkeypatch):
    rows, scored = make_clips([0.1, 0.2], 1)
    folder = ScoreFolder(tmp_path / "out", {})
    folder.append([{name: clip[name] for name in ("id", "score", "captions", "labels")} for clip in scored])
    write_report(folder.report, rows, scored, {}, "one")
    before = files_of(folder.report)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dali_llava.train.filtering.page.plot_scores", full)
    with pytest.raises(OSError, match=r"report: cannot be written \(No space left on device\); give --output_dir"):
        folder.finish(rows, np.array([True, True]), {}, "two")
    assert files_of(folder.report) == before and not (tmp_path / "out" / "kept.txt").exists()
    monkeypatch.setattr("dali_llava.train.filtering.scores.write_report", lambda *args: None)
    folder.finish(rows, np.array([False, True]), {}, "one")
    assert (tmp_path / "out" / "kept.txt").read_text() == "clip1\n"


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").touch()
    with pytest.raises(ValueError, match="report: contains other files, which would be lost; give --output_dir a new"):
        ScoreFolder(tmp_path, {})
    assert set(files_of(tmp_path)) == {"report/mine.txt"}


def test_the_kept_are_in_colour(tmp_path):
    scores = np.linspace(0, 1, 40)

    def red_pixels(count: int) -> int:
        plot_scores(scores, np.arange(40) < count, tmp_path / "histogram.png")
        picture = np.asarray(Image.open(tmp_path / "histogram.png").convert("RGB"))
        return int((picture == RED).all(axis=2).sum())

    legend, half, whole = (red_pixels(count) for count in (0, 20, 40))
    assert 0 < legend < half and half - legend == pytest.approx((whole - legend) / 2, rel=0.05)
