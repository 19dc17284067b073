"""Sound and frames of corpus rows."""

import io

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.avworld.avworld import make_row
from dali_llava.processing.corpora.rows import open_audio, open_clip_frames, open_frames, open_middle_frame
from dali_llava.processing.media import MediaError, load_audio, load_frames


RATE = 16000


def file(path) -> dict:
    return {"path": str(path), "bytes": None}


def row(audio=None, frames=(), start: float | None = 0.0, end: float | None = None) -> dict:
    audio = None if audio is None else file(audio)
    return {"id": "this", "audio": audio, "frames": [file(path) for path in frames], "start": start, "end": end}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_sound_of_a_file_is_cut_to_the_clip(media_dir):
    path = media_dir / "long.flac"
    whole = open_audio(row(path))
    assert whole.shape == (6 * RATE,) and whole.dtype == np.float32
    np.testing.assert_array_equal(open_audio(row(path, start=2.0, end=4.5)), whole[2 * RATE : round(4.5 * RATE)])
    np.testing.assert_array_equal(open_audio(row(path, start=2.0)), whole[2 * RATE :])
    np.testing.assert_array_equal(open_audio(row(path, start=None)), whole)
    np.testing.assert_array_equal(
        open_audio(row(path, start=1.0, end=2.0), 8000), load_audio(path, 8000, start=1.0, duration=1.0)
    )


def test_sound_of_a_video(media_dir):
    assert open_audio(row(media_dir / "clip.mp4", start=1.0, end=2.0)).shape == (RATE,)


def test_bytes_hold_the_clip_alone():
    world = make_row("test", 0)
    samples, _ = soundfile.read(io.BytesIO(world["audio"]["bytes"]), dtype="float32")
    np.testing.assert_array_equal(open_audio(world | {"start": 1.0, "end": 2.0}), samples)
    frames = open_frames(world)
    assert [frame.size for frame in frames] == [(48, 48)] * 4
    expected = Image.open(io.BytesIO(world["frames"][2]["bytes"]))
    np.testing.assert_array_equal(np.asarray(frames[2]), np.asarray(expected))


def test_a_sound_may_stop_a_little_before_the_end_of_its_clip(media_dir):
    assert open_audio(row(media_dir / "long.flac", start=1.0, end=6.9)).shape == (5 * RATE,)


@pytest.mark.parametrize(
    ("name", "start", "end", "message"),
    [
        ("long.flac", 8.0, 10.0, r"start=8 s is outside the sound.* \(the file lasts 6.00 s\)$"),
        ("long.flac", 8.0, None, r"start=8 s is outside the sound.* \(the file lasts 6.00 s\)$"),
        ("clip.mp4", 30.0, 40.0, r"start=30 s is outside the sound.* \(the file lasts 3\.\d\d s\)$"),
        ("long.flac", 0.0, 10.0, "the clip ends at 10 s, its sound at 6.00 s; correct `end`$"),
        ("long.flac", 4.0, 8.0, "the clip ends at 8 s, its sound at 6.00 s; correct `end`$"),
        ("silent.mp4", 0.0, None, "is a video without sound"),
        ("photo.jpg", 0.0, None, "is a still image, without sound"),
        ("absent.wav", 0.0, 1.0, "no such file"),
        ("absent.wav", 1.0, 2.0, "no such file"),
    ],
)
def test_sound_that_cannot_be_had_is_named(name, start, end, message, media_dir):
    with pytest.raises(MediaError, match=rf"^clip 'this': .*{name}: {message}"):
        open_audio(row(media_dir / name, start=start, end=end))


def test_a_row_without_sound_or_frames_is_named():
    with pytest.raises(MediaError, match="^clip 'this': the row has no sound; load the corpus with missing='skip'"):
        open_audio(row())
    with pytest.raises(MediaError, match="^clip 'this': the row has no frames; add a video or pictures$"):
        open_frames(row())


def test_frames_of_a_video_are_the_first_of_each_second(media_dir):
    path = media_dir / "clip.mp4"

    def equal(frames, times) -> bool:
        expected = load_frames(path, times)
        return len(frames) == len(expected) and all(
            map(np.array_equal, map(np.asarray, frames), map(np.asarray, expected))
        )

    assert equal(open_frames(row(frames=[path])), [0, 1, 2])
    assert equal(open_frames(row(frames=[path], start=0.5, end=2.5)), [0.5, 1.5])
    assert equal(open_frames(row(frames=[path], start=1.0, end=2.7)), [1, 2])
    assert equal(open_frames(row(frames=[path], start=1.0, end=2.4)), [1])  # the last 0.4 s are ignored
    assert equal(open_frames(row(frames=[path], start=1.0, end=1.2)), [1])
    assert equal(open_frames(row(frames=[path], start=1.0, end=3.9)), [1, 2])  # the video ends first
    assert equal(open_frames(row(frames=[path], start=1.0), seconds=[1, 0, 1]), [2, 1, 2])


def test_frames_of_a_whole_clip_are_spread_evenly(media_dir):
    path = media_dir / "silent.mp4"  # 2 s

    def times(clip, **options) -> list[float]:
        """Times whose frames are those of the clip."""
        shown = open_clip_frames(clip, **{"num_frames": 20, "frame_rate": 2.0, **options})
        known = {np.asarray(load_frames(path, time)[0]).tobytes(): time for time in (0.25, 0.75, 1.0, 1.25, 1.75)}
        return [known[np.asarray(frame).tobytes()] for frame in shown]

    assert times(row(frames=[path])) == [0.25, 0.75, 1.25, 1.75]
    assert times(row(frames=[path], start=0.5, end=1.5)) == [0.75, 1.25]
    assert times(row(frames=[path], start=1.0, end=9.0)) == [1.25, 1.75]  # the video ends first
    assert times(row(frames=[path]), num_frames=1) == [1.0]
    in_bytes = row(start=5.0, end=7.0) | {"frames": [{"path": "silent.mp4", "bytes": path.read_bytes()}]}
    assert times(in_bytes) == [0.25, 0.75, 1.25, 1.75]


@pytest.mark.parametrize(
    ("num_frames", "shown"), [(1, [5]), (2, [2, 7]), (4, [1, 3, 6, 8]), (10, range(10)), (20, range(10))]
)
def test_pictures_of_a_whole_clip_are_spread_evenly(tmp_path, num_frames, shown):
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 6), (20 * number,) * 3).save(path)
    clip = row(frames=paths, end=10.0)
    frames = open_clip_frames(clip, num_frames, frame_rate=0.1)
    assert [frame.getpixel((0, 0))[0] // 20 for frame in frames] == list(shown)
    if num_frames == 1:
        assert frames == [open_middle_frame(clip)]
    else:
        shrunk = open_clip_frames(clip, num_frames, frame_rate=0.1, shorter_side=3)
        assert {frame.size for frame in shrunk} == {(4, 3)}


def test_a_row_without_frames_has_no_clip(media_dir):
    for clip, message in ((row(), "has no frames"), (row(frames=[media_dir / "bark.wav"]), "sound only, no picture")):
        with pytest.raises(MediaError, match=f"^clip 'this': .*{message}"):
            open_clip_frames(clip, 4, 2.0)


def test_frames_of_a_video_in_bytes(media_dir):
    clip = row(start=2.0, end=3.0) | {"frames": [{"path": "clip.mp4", "bytes": (media_dir / "clip.mp4").read_bytes()}]}
    assert len(open_frames(clip)) == 3


def test_pictures_are_frames_as_they_stand(tmp_path, media_dir):
    for colour in ("red", "lime", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    paths = [tmp_path / "red.png", tmp_path / "lime.png", tmp_path / "blue.png"]
    pixels = [frame.getpixel((0, 0)) for frame in open_frames(row(frames=paths, end=1.0))]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert [frame.getpixel((0, 0)) for frame in open_frames(row(frames=paths), [2, 0])] == [pixels[2], pixels[0]]
    assert open_frames(row(frames=[media_dir / "photo.jpg"], start=5.0))[0].size == (80, 60)


def test_the_first_frames_are_as_many_as_there_are(tmp_path, media_dir):
    for colour in ("red", "lime", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    clip = row(frames=[tmp_path / "red.png", tmp_path / "lime.png", tmp_path / "blue.png"])
    assert [frame.getpixel((0, 0)) for frame in open_frames(clip, most=2)] == [(255, 0, 0), (0, 255, 0)]
    assert len(open_frames(clip, most=10)) == 3
    assert len(open_frames(row(frames=[media_dir / "clip.mp4"]), most=1)) == 1
    assert len(open_frames(row(frames=[media_dir / "clip.mp4"]), most=10)) == 3


def test_a_row_that_names_nothing_is_told():
    nothing = {"path": None, "bytes": None}
    with pytest.raises(MediaError, match="clip 'this': the row has neither a path nor bytes; add the file"):
        open_audio(row() | {"audio": nothing})
    with pytest.raises(MediaError, match="clip 'this': the row has neither a path nor bytes; add the file"):
        open_frames(row() | {"frames": [nothing]})


@pytest.mark.parametrize(
    ("names", "options", "seconds", "message"),
    [
        (["clip.mp4"], {"start": 5.0, "end": 6.0}, None, r"the clip starts at 5 s, the video ends at 3\.\d\d s$"),
        (["clip.mp4"], {}, [3], "has no second 3; it has 3, counted from 0$"),
        (["clip.mp4"], {}, [-1], "has no second -1; it has 3, counted from 0$"),
        (["photo.jpg"], {}, [1], "has no second 1; it has 1, counted from 0$"),
        (["bark.wav"], {}, None, "contains sound only, no picture"),
        (["photo.jpg", "clip.mp4"], {}, None, "is video, not a still image"),
        (["absent.mp4"], {}, None, "no such file"),
    ],
)
def test_frames_that_cannot_be_had_are_named(names, options, seconds, message, media_dir):
    with pytest.raises(MediaError, match=rf"^clip 'this': (.*: )?{message}"):
        open_frames(row(frames=[media_dir / name for name in names], **options), seconds)


def test_real_clips(shared_data, tmp_path):
    datasets.disable_progress_bars()
    corpus = load_corpus("folder", "train", data_dir=shared_data / "clips", cache_dir=tmp_path)
    datasets.enable_progress_bars()
    assert [open_audio(clip).shape for clip in corpus] == [(160000,), (160128,)]
    frames = [open_frames(clip) for clip in corpus]
    assert [(len(images), images[0].size) for images in frames] == [(10, (256, 144)), (10, (1280, 720))]
