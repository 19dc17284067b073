"""The windows of a whole file, one after the other: one decoder per track, forward only, in flat memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION

from .frames import read_frames
from .load import check_finite, probe, short_error
from .sound import read_sound, resample
from .source import MediaError, MediaSource, open_source, sniff


WINDOW_MARGIN = 0.05  # seconds of sound beyond a window's end: a spectrogram's last frame reaches past it


@dataclass(frozen=True)
class Window:
    """
    A stretch of a file, from `start` to `end` in seconds.

    Attributes:
        audio: its sound and up to WINDOW_MARGIN more, mono (samples,) float32; None where the sound has ended.
        image: the RGB frame shown in the middle; None where none is asked for.
    """

    start: float
    end: float
    audio: np.ndarray | None = None
    image: Image.Image | None = None


def load_windows(
    path: MediaSource, seconds: float, sampling_rate: int = 16000, audio: bool = True, image: bool = False
) -> Iterator[Window]:
    """
    The windows of `seconds` that cover a sound or video file, to its true end.

    A last window that is shorter than 0.1 s is left out. Where the sound of a video ends early, the windows after it
    have the picture alone; where the picture does, its last frame stays.

    Args:
        sampling_rate: of the sound, in Hz.
        audio, image: which of them to read.

    Raises:
        MediaError: at the window where it shows: see `load_audio` and `load_frames`.

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
        raise MediaError(f"{info.path}: holds sound only, no picture; use it as audio, or pass a video")
    if image and info.duration is None:
        raise MediaError(f"{info.path}: its duration is unknown; remux it, or use its sound alone")
    if not image:
        yield from _sound_windows(path, seconds, sampling_rate)
        return
    count = max(1, math.ceil((info.duration - MIN_DURATION) / seconds))
    spans = [(number * seconds, min((number + 1) * seconds, info.duration)) for number in range(count)]
    sounds = _sound_windows(path, seconds, sampling_rate) if audio else iter(())
    with open_source(path) as (name, handle):
        images = read_frames(name, handle, [(start + end) / 2 for start, end in spans])
        for (start, end), frame in zip(spans, images, strict=True):
            sound = next(sounds, None)
            yield Window(start, end, None if sound is None else sound.audio, frame)


def _sound_windows(path: MediaSource, seconds: float, sampling_rate: int) -> Iterator[Window]:
    with open_source(path) as (name, handle):
        chunks = resample(read_sound(name, handle, sniff(name, handle)), sampling_rate)
        held, first, number = [], 0, 0  # samples from `first` on
        for chunk in chunks:
            held.append(chunk)
            # joined a window at a time, so that small chunks are not copied over and over
            while first + sum(map(len, held)) >= round(((number + 1) * seconds + WINDOW_MARGIN) * sampling_rate):
                held = [np.concatenate(held)]
                number, first, window = _cut(name, held, first, number, seconds, sampling_rate)
                yield window
        rest = np.concatenate(held) if held else np.zeros(0, np.float32)
        if number == 0 and first + len(rest) == 0:
            raise MediaError(f"{name}: holds no sound at all (zero length); record or export it again")
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
    """Takes window `number` off what is held: the next number, the place of the first sample held, and the window."""
    (samples,) = held
    start, following = number * seconds, round((number + 1) * seconds * sampling_rate)
    audio = samples[: round((seconds + WINDOW_MARGIN) * sampling_rate)].copy()
    check_finite(name, audio)
    end = min(start + seconds, start + len(samples) / sampling_rate)
    held[0] = samples[following - first :]
    return number + 1, following, Window(start, end, audio)
