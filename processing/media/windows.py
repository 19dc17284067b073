"""Read a whole file window by window, with one decoder per track, forward only, in constant memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from PIL import Image

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION

from .frames import frame_times, read_frames
from .load import check_finite, probe, short_error
from .sound import read_sound, resample
from .source import MediaError, MediaSource, open_source, sniff


WINDOW_MARGIN = 0.05  # seconds of sound after the end of a window, which the last frame of a spectrogram covers


@dataclass(frozen=True)
class Window:
    """
    A part of a file, from `start` to `end` in seconds.

    Attributes:
        audio: mono sound of the window and up to WINDOW_MARGIN more, (samples,) float32; None if the sound has ended
            or is not requested.
        frames: RGB frames at `frame_times` of the window, by default the one in the middle; empty if not requested.
    """

    start: float
    end: float
    audio: np.ndarray | None = None
    frames: tuple[Image.Image, ...] = ()


def load_windows(
    path: MediaSource,
    seconds: float,
    sampling_rate: int = 16000,
    audio: bool = True,
    image: bool = False,
    num_frames: int = 1,
    frame_rate: float = 2.0,
    shorter_side: int | None = None,
) -> Iterator[Window]:
    """
    Yield consecutive windows that cover a sound or video file to its true end.

    A last window shorter than 0.1 s is dropped. If the sound of a video ends before the picture, the windows after it
    only have frames. If the picture ends first, its last frame stays.

    Args:
        path: a sound or video file.
        seconds: length of a window.
        sampling_rate: sampling rate of the sound in Hz.
        audio: whether to read the sound.
        image: whether to read frames.
        num_frames, frame_rate: maximum number of frames per window and per second, see `frame_times`.
        shorter_side: see `load_frames`.

    Raises:
        MediaError: as in `load_audio` and `load_frames`, when the window with the error is reached.

    Example:
        >>> import tempfile
        >>> import soundfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soundfile.write(f"{folder}/a.wav", np.zeros(25_000), 10_000)
        ...     [(window.start, window.end) for window in load_windows(f"{folder}/a.wav", 1.0)]
        [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5)]
    """
    info = probe(path)
    if info.kind == "image":
        raise MediaError(f"{info.path}: is a still image, which has no windows; load it as an image")
    if image and not info.has_video:
        raise MediaError(f"{info.path}: contains sound only, no picture; use it as audio, or pass a video")
    if image and info.duration is None:
        raise MediaError(f"{info.path}: its duration is unknown; remux it, or use its sound alone")
    if not image:
        yield from _sound_windows(path, seconds, sampling_rate)
        return
    count = max(1, math.ceil((info.duration - MIN_DURATION) / seconds))
    spans = [(number * seconds, min((number + 1) * seconds, info.duration)) for number in range(count)]
    sounds = _sound_windows(path, seconds, sampling_rate) if audio else iter(())
    with open_source(path) as (name, handle):
        times = [frame_times(start, end, num_frames, frame_rate) for start, end in spans]
        frames = read_frames(name, handle, list(chain.from_iterable(times)), shorter_side)
        for (start, end), own in zip(spans, times, strict=True):
            shown = tuple(islice(frames, len(own)))
            sound = next(sounds, None)
            yield Window(start, end, None if sound is None else sound.audio, shown)


def _sound_windows(path: MediaSource, seconds: float, sampling_rate: int) -> Iterator[Window]:
    with open_source(path) as (name, handle):
        chunks = resample(read_sound(name, handle, sniff(name, handle)), sampling_rate)
        held, first, number = [], 0, 0  # chunks that start at sample `first`
        for chunk in chunks:
            held.append(chunk)
            # joined once per window, so that small chunks are not copied repeatedly
            while first + sum(map(len, held)) >= round(((number + 1) * seconds + WINDOW_MARGIN) * sampling_rate):
                held = [np.concatenate(held)]
                number, first, window = _cut(name, held, first, number, seconds, sampling_rate)
                yield window
        rest = np.concatenate(held) if held else np.zeros(0, np.float32)
        if number == 0 and first + len(rest) == 0:
            raise MediaError(f"{name}: contains no sound (zero length); record or export it again")
        held = [rest]
        while True:
            left = len(held[0]) / sampling_rate
            if left < MIN_DURATION:
                if number == 0:
                    raise short_error(name, left)
                return
            number, first, window = _cut(name, held, first, number, seconds, sampling_rate)
            yield window


def _cut(
    name: str, held: list[np.ndarray], first: int, number: int, seconds: float, sampling_rate: int
) -> tuple[int, int, Window]:
    """Remove a window from `held`. Return the next number, the position of the first sample held, the window."""
    (samples,) = held
    start, following = number * seconds, round((number + 1) * seconds * sampling_rate)
    audio = samples[: round((seconds + WINDOW_MARGIN) * sampling_rate)].copy()
    check_finite(name, audio)
    end = min(start + seconds, start + len(samples) / sampling_rate)
    held[0] = samples[following - first :]
    return number + 1, following, Window(start, end, audio)
