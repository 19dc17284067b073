"""Statistics of a corpus, and the choice and opening of its samples."""

import io
import random
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.inspect.clip_page import open_clip
from dali_llava.processing.inspect.summary import CorpusSummary, clip_duration, inspect_rows


def source(path: Path | None, content: bytes | None = None) -> dict:
    return {"path": None if path is None else str(path), "bytes": content}


def make_row(name: str = "clip", audio: Path | dict | None = None, *frames: Path, **fields) -> dict:
    row = {"id": name, "audio": source(audio) if isinstance(audio, Path) else audio}
    row |= {"frames": [source(path) for path in frames]}
    return row | {"captions": [], "labels": [], "start": 0.0, "end": None, "source": "made"} | fields


def summary_of(*rows: dict) -> CorpusSummary:
    summary = CorpusSummary()
    for row in rows:
        summary.add(row)
    return summary


def timed(*durations: float) -> CorpusSummary:
    return summary_of(*(make_row(start=1.0, end=1.0 + duration) for duration in durations))


@pytest.fixture
def broken(tmp_path) -> Path:
    path = tmp_path / "broken.wav"
    path.write_text("no sound at all")
    return path


def test_rows_are_counted(media_dir):
    summary = summary_of(
        make_row("a", media_dir / "long.flac", media_dir / "clip.mp4", captions=["one", "two"], labels=["dog", "dog"]),
        make_row("b", media_dir / "bark.wav", captions=["three"], labels=["dog", "cat"]),
        make_row("c", None, media_dir / "photo.jpg", labels=["bee"], end=4.0),
        make_row("d", audio=source(None), end=10.0),  # as Arrow returns a null
    )
    counts = summary.clips, summary.with_sound, summary.with_frames, summary.with_captions, summary.with_labels
    assert (*counts, summary.captions) == (4, 2, 2, 2, 3, 3)
    assert summary.frequent_labels() == [("dog", 2), ("bee", 1), ("cat", 1)]
    assert summary.frequent_labels(2) == [("dog", 2), ("bee", 1)]
    assert list(summary.durations) == pytest.approx([6.0, 1.5, 4.0, 10.0])
    assert dict(summary.table()) == {
        "clips": "4",
        "with sound": "2 (50%)",
        "with frames": "2 (50%)",
        "with captions": "2 (50%)",
        "with labels": "3 (75%)",
        "captions in total": "3",
        "durations": "1.50 to 10.00 s, median 5.00 s; 0.00597 h in total",
        "distinct labels": "3: dog 2; bee 1; cat 1",
        "cannot be opened": "0 of 0 checked",
    }


def test_a_duration_is_the_row_s_or_else_its_file_s(media_dir):
    bark, content = media_dir / "bark.wav", (media_dir / "bark.wav").read_bytes()
    for row, expected in (
        (make_row(audio=media_dir / "not there.wav", start=2.0, end=12.0), 10.0),
        (make_row(audio=bark), 1.5),
        (make_row(audio=bark, start=0.5), 1.0),
        (make_row(audio=bark, start=None), 1.5),
        (make_row(audio=source(bark, content), start=30.0), 1.5),
        (make_row("video", None, media_dir / "silent.mp4"), 2.0),
    ):
        assert clip_duration(row) == (pytest.approx(expected, abs=0.05), None)


def test_an_unknown_duration_has_a_reason(media_dir, broken):
    for row, reason in (
        (make_row(), "no media"),
        (make_row(audio=media_dir / "not there.wav"), "missing"),
        (make_row(audio=broken), "broken"),
        (make_row("picture", None, media_dir / "photo.jpg"), "undeclared"),
        (make_row(audio=media_dir / "bark.wav", start=1.5), "too_short"),
    ):
        assert clip_duration(row) == (None, reason)
    summary = summary_of(make_row(audio=broken), make_row(audio=broken), make_row(), make_row(end=2.0))
    assert dict(summary.table())["unknown duration"] == "3 (broken 2, no media 1)"
    assert summary.to_dict()["durations"]["unknown"] == {"broken": 2, "no media": 1}


def test_figures_of_durations():
    figures = timed(7200.0, 1800.0, 3600.0, 5400.0).to_dict()["durations"]
    assert [figures[name] for name in ("known", "min", "median", "max", "total_hours")] == [4, 1800, 4500, 7200, 5.0]
    figures = timed().to_dict()["durations"]
    assert [figures[name] for name in ("known", "min", "median", "max", "total_hours")] == [0, None, None, None, 0.0]
    assert dict(timed(7200.0).table())["durations"] == "7200.00 to 7200.00 s, median 7200.00 s; 2.00 h in total"


def test_histogram_has_round_edges_and_holds_every_clip():
    assert timed(0.5, 1.5, 1.5, 9.0).histogram()[:4] == [(0.5, 1.0, 1), (1.0, 1.5, 0), (1.5, 2.0, 2), (2.0, 2.5, 0)]
    assert timed(2.56, 2.56).histogram() == [(2.56, 2.56, 2)]
    assert timed().histogram() == []
    draw = random.Random(0)
    for _ in range(50):
        low, span = draw.uniform(0.1, 100), 10 ** draw.uniform(-2, 4)
        durations = [low + span * draw.random() for _ in range(30)]
        bins = timed(*durations).histogram()
        assert len(bins) <= 21 and sum(count for *_, count in bins) == 30
        assert bins[0][0] <= min(durations) + 1e-5 and max(durations) <= bins[-1][1] + 1e-5
        assert [stop for _, stop, _ in bins[:-1]] == [start for start, *_ in bins[1:]]


def test_samples_depend_on_the_seed_alone():
    rows = [make_row(str(number)) for number in range(40)]

    def chosen(samples: int, seed: int, check: int = 0) -> list[str]:
        return [sample.row["id"] for sample in inspect_rows(iter(rows), samples, check, seed)[1]]

    assert chosen(10, 0) == chosen(10, 0) != chosen(10, 1)
    assert chosen(10, 0, check=30) == chosen(10, 0) and chosen(3, 0) == chosen(10, 0)[:3]
    assert sorted(chosen(100, 0), key=int) == [row["id"] for row in rows]


def test_every_row_is_as_likely_to_be_chosen():
    rows = [make_row(str(number)) for number in range(5)]
    drawn = Counter(sample.row["id"] for seed in range(500) for sample in inspect_rows(rows, 2, seed=seed)[1])
    # 500 draws with probability 2 / 5: a standard deviation of 11
    assert set(drawn) == {"0", "1", "2", "3", "4"} and all(abs(count - 200) < 44 for count in drawn.values())


def test_rows_are_let_go():
    class Row(dict):
        pass

    alive = weakref.WeakValueDictionary()

    def rows():
        for number in range(300):
            row = alive[number] = Row(make_row(str(number)))
            yield row
            del row
            assert len(alive) <= 5 + 2  # the samples, the current row, and the row that it replaces

    summary, samples = inspect_rows(rows(), 5)
    assert (summary.clips, len(samples)) == (300, 5)


def test_sound_and_frames_are_opened_apart(media_dir, broken, tmp_path):
    clip, photo = media_dir / "clip.mp4", media_dir / "photo.jpg"
    whole = open_clip(make_row("whole", clip, clip))
    assert sorted(whole.files) == ["0.jpg", "1.jpg", "2.jpg", "flac"] and whole.problems == []
    waveform, rate = soundfile.read(io.BytesIO(whole.files["flac"]))
    assert rate == 16_000 and len(waveform) / rate == pytest.approx(3.0, abs=0.1)
    red, _, blue = np.asarray(Image.open(io.BytesIO(whole.files["0.jpg"]))).mean((0, 1))
    assert red > 200 and blue < 50

    for row, files, reason in (
        (make_row("a", broken, photo), ["0.jpg"], "broken"),
        (make_row("b", media_dir / "bark.wav", broken), ["flac"], "broken"),
        (make_row("c", tmp_path / "gone.wav", photo), ["0.jpg"], "missing"),
        (make_row("d", media_dir / "silent.mp4", photo), ["0.jpg"], "no_sound"),
        (make_row("e", media_dir / "bark.wav", media_dir / "long.flac"), ["flac"], "no_picture"),
    ):
        sample = open_clip(row)
        assert list(sample.files) == files
        assert [problem.reason for problem in sample.problems] == [reason]
    both = open_clip(make_row("f", broken, tmp_path / "gone.jpg"))
    assert both.files == {} and [problem.reason for problem in both.problems] == ["broken", "missing"]
    assert str(broken) in both.problems[0].detail and str(tmp_path / "gone.jpg") in both.problems[1].detail
    assert open_clip(make_row()).files == {} and open_clip(make_row(audio=source(None))).problems == []


def test_silence_and_frozen_frames_are_no_trouble(tmp_path, media_dir):
    soundfile.write(tmp_path / "still.wav", np.zeros(8000), 16_000)
    photo = media_dir / "photo.jpg"
    sample = open_clip(make_row("still", tmp_path / "still.wav", photo, photo))
    assert sorted(sample.files) == ["0.jpg", "1.jpg", "flac"] and sample.problems == []


def test_more_clips_may_be_checked_than_shown(media_dir, broken, tmp_path):
    rows = [make_row(f"good {number}", media_dir / "bark.wav") for number in range(8)]
    rows += [make_row(f"bad {number}", broken, tmp_path / "gone.jpg") for number in range(3)]
    rows += [make_row("gone", tmp_path / "gone.wav"), make_row("without media")]
    summary, samples = inspect_rows(rows, samples=2, check=100)
    assert (summary.checked, summary.broken, len(samples)) == (12, {"broken": 3, "missing": 1}, 2)
    assert dict(summary.table())["cannot be opened"] == "4 (broken 3, missing 1) of 12 checked"
    assert inspect_rows(rows[:12])[0].checked == 10


def test_a_file_name_that_is_no_unicode(media_dir, tmp_path):
    path = tmp_path / "caf\udce9.wav"
    path.symlink_to(media_dir / "bark.wav")
    assert list(open_clip(make_row("caf\udce9", path)).files) == ["flac"]


def test_no_rows_and_no_samples_are_errors():
    with pytest.raises(ValueError, match="the corpus has no clips"):
        inspect_rows([])
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        inspect_rows([make_row()], samples=0)
