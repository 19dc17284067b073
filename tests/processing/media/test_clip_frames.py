"""Several frames of a video: which times are shown, in one pass, and in windows."""

from fractions import Fraction

import av
import numpy as np
import pytest

from dali_llava.processing.media import MediaError, frame_times, frames, load_clip_frames, load_windows


LENGTH, COUNT = 2.0, 20  # seconds and frames of silent.mp4, which fades from red to blue


def shows(images, numbers: list[int]) -> bool:
    """Whether images are the numbered frames of silent.mp4, of which the codec has made some equal to the next one."""
    colours = [np.asarray(image, float).mean((0, 1)) for image in images]
    faded = [COUNT * (blue - red + 255) / 510 for red, _, blue in colours]
    return faded == pytest.approx(numbers, abs=1.1)


@pytest.mark.parametrize(
    ("part", "options", "times"),
    [
        ((0.0, 10.0), {"num_frames": 20}, [0.25 + 0.5 * number for number in range(20)]),
        ((0.0, 2.0), {"num_frames": 20}, [0.25, 0.75, 1.25, 1.75]),  # fewer frames of a short video
        ((0.0, 60.0), {"num_frames": 3}, [10, 30, 50]),
        ((4.0, 6.0), {"num_frames": 9, "frame_rate": 1.0}, [4.5, 5.5]),
        ((0.0, 10.0), {}, [5.0]),
        ((1.0, 1.01), {"num_frames": 20}, [1.005]),
        ((3.0, 3.0), {"num_frames": 20}, [3.0]),
    ],
)
def test_times_are_the_middles_of_equal_parts(part, options, times):
    assert frame_times(*part, **options) == pytest.approx(times, abs=1e-12)


def test_frames_at_known_times(media_dir):
    path = media_dir / "silent.mp4"
    assert shows(load_clip_frames(path, 0.0, LENGTH, num_frames=20), [2, 7, 12, 17])
    assert shows(load_clip_frames(path, num_frames=20), [2, 7, 12, 17])
    assert shows(load_clip_frames(path, 0.5, 1.5, num_frames=20), [7, 12])
    assert shows(load_clip_frames(path, num_frames=3), [3, 10, 16])
    assert shows(load_clip_frames(path), [10])
    assert [image.size for image in load_clip_frames(path, num_frames=2, shorter_side=24)] == [(32, 24)] * 2


def test_all_frames_are_decoded_in_one_pass(media_dir, monkeypatch):
    opened, decoded = [], []

    def open_container(*arguments):
        opened.append(arguments[0])
        return containers_open(*arguments)

    def decode(*arguments):
        for frame in containers_decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    containers_open, containers_decode = frames.open_container, frames.decode
    monkeypatch.setattr(frames, "open_container", open_container)
    monkeypatch.setattr(frames, "decode", decode)
    assert shows(load_clip_frames(media_dir / "silent.mp4", num_frames=20, frame_rate=10.0), list(range(COUNT)))
    assert len(opened) == 1 and decoded == sorted(set(decoded)) and len(decoded) == COUNT


def test_variable_frame_rate_and_rotation(tmp_path):
    """A frame stays until the next one, however late that is, and is rotated upright."""
    starts = [0, 1, 2, 10, 11, 30, 39]  # tenths of a second
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for number, start in enumerate(starts):
            grey = np.full((48, 64, 3), 30 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    shown = load_clip_frames(tmp_path / "a.mp4", 0.0, 4.0, num_frames=8)  # at 0.25, 0.75, ..., 3.75 s
    assert [round(np.asarray(image).mean() / 30) for image in shown] == [2, 2, 4, 4, 4, 4, 5, 5]
    assert [image.size for image in shown] == [(48, 64)] * 8


def test_parts_outside_the_video(media_dir):
    with pytest.raises(MediaError, match=r"silent\.mp4: start=3 s is after the end, 2 s; give a start before it"):
        load_clip_frames(media_dir / "silent.mp4", 3.0, num_frames=4)
    with pytest.raises(MediaError, match=r"silent\.mp4: time 2\.25 s is outside the video, which lasts 2\.000 s"):
        load_clip_frames(media_dir / "silent.mp4", 0.0, 4.0, num_frames=8)
    with pytest.raises(MediaError, match="contains sound only"):
        load_clip_frames(media_dir / "bark.wav", num_frames=4)


def test_windows_have_frames_of_their_own_part(media_dir):
    windows = list(load_windows(media_dir / "silent.mp4", 1.0, audio=False, image=True, num_frames=4, shorter_side=24))
    assert len(windows) == 2 and shows(windows[0].frames, [2, 7]) and shows(windows[1].frames, [12, 17])
    assert {image.size for window in windows for image in window.frames} == {(32, 24)}
    middles = list(load_windows(media_dir / "silent.mp4", 1.5, audio=False, image=True))
    assert len(middles) == 2 and shows(middles[0].frames, [7]) and shows(middles[1].frames, [17])
    heard = list(load_windows(media_dir / "clip.mp4", 1.0, num_frames=4))
    assert len(heard) == 3 and all(window.frames == () for window in heard)
