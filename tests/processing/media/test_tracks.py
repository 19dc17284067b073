"""Selection of tracks, tracks of unequal length, pixels that are not square, and transparent videos."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from dali_llava.processing.media import MediaError, load_audio, load_frames, load_windows, probe


def write(path, picture_frames, sound_seconds, container="matroska", levels=(0.3,), default=0, ratio=None):
    with av.open(str(path), "w", format=container) as output:
        video = output.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if ratio is not None:
            video.codec_context.sample_aspect_ratio = ratio
        tracks = [output.add_stream("aac", rate=16_000, layout="mono") for _ in levels]
        for number, track in enumerate(tracks):
            track.disposition = Disposition.default if number == default else Disposition(0)
        for index in range(picture_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 100, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        time = np.arange(round(16_000 * sound_seconds)) / 16_000
        for track, level in zip(tracks, levels, strict=True):
            samples = (level * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), 0
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize(("frames", "seconds"), [(1, 6.0), (50, 6.0), (150, 2.0)])
def test_a_track_that_ends_early_is_no_cut(tmp_path, container, frames, seconds):
    path = write(tmp_path / "a", frames, seconds, container)
    assert len(load_audio(path)) / 16_000 == pytest.approx(seconds, abs=0.15)
    assert [np.asarray(image).mean() for image in load_frames(path, [0.0, 5.8])] == pytest.approx([100, 100], abs=4)
    windows = list(load_windows(path, 2.5, image=True))
    assert len(windows) >= 3 and all(len(window.frames) == 1 for window in windows)
    assert [window.audio is not None for window in windows[:3]] == (
        [True] * 3 if seconds == 6.0 else [True, False, False]
    )


def test_missing_bytes_are_a_cut(tmp_path):
    path = write(tmp_path / "a.mkv", 150, 6.0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(MediaError, match="is cut off at"):
        load_audio(path)
    with pytest.raises(MediaError, match="is cut off at"):
        list(load_windows(path, 2.0))


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_sound_track_is_taken(tmp_path, default):
    path = write(tmp_path / "a.mkv", 50, 2.0, levels=(0.1, 0.4), default=default)
    assert np.abs(load_audio(path)[4000:28_000]).max() == pytest.approx((0.1, 0.4)[default], rel=0.1)


@pytest.mark.parametrize(("ratio", "size"), [(Fraction(2), (128, 48)), (Fraction(1, 2), (32, 48))])
def test_pixels_are_made_square(tmp_path, ratio, size):
    path = write(tmp_path / "a.mp4", 25, 1.0, "mp4", ratio=ratio)
    assert load_frames(path, 0.5)[0].size == size
    assert (probe(path).width, probe(path).height) == (64, 48)


def test_transparent_video_lies_on_white(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        video = output.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 16, 16, "bgra"
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:, :, 0], pixels[8:, :, 3] = 200, 255
        output.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="bgra")))
        output.mux(video.encode(None))
    image = load_frames(tmp_path / "a.mkv", 0.0)[0]
    assert (image.getpixel((3, 3)), image.getpixel((3, 12))) == ((255, 255, 255), (0, 0, 200))


@pytest.mark.parametrize(("name", "sound"), [("oneframe.mkv", 6.0), ("sound_shorter.mkv", 4.0)])
def test_reported_videos(shared_data, name, sound):
    path = shared_data / "reports" / name
    assert len(load_audio(path)) / 16_000 == pytest.approx(sound, abs=0.05)
    assert len(load_frames(path, [0.0, 5.9])) == 2
