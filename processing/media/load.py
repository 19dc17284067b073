"""
Sound, frames and images out of media files: soundfile for plain audio, PyAV (with its own FFmpeg) for the rest.

Every function takes a path, bytes, a binary file object, or a `{"path", "bytes"}` row of a `datasets` column, and goes
by the content, never by the extension. Whatever is wrong with the input raises a [`MediaError`] of one line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import soxr
from PIL import Image

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION

from .containers import audio_stream, declared_end, file_length, open_container, video_stream
from .frames import read_frames
from .images import read_image
from .ogg import open_sounds
from .sound import read_sound
from .source import IMAGE_FORMATS, MediaError, MediaSource, open_source, sniff, source_name


RESAMPLING_MARGIN = 0.1  # seconds


@dataclass(frozen=True)
class MediaInfo:
    """
    What a file holds: `kind` is "audio", "image" or "video".

    Attributes:
        duration: seconds to the end of the longest track; None where not even the packets tell.
        picture_duration: seconds to the end of a video's picture track, where its table says so: the picture may end
            before the sound, and its last frame stays.
        width, height: in stored pixels, which need not be square.
    """

    path: str
    kind: str
    has_audio: bool
    has_video: bool
    duration: float | None = None
    sampling_rate: int | None = None
    channels: int | None = None
    width: int | None = None
    height: int | None = None
    frame_rate: float | None = None
    picture_duration: float | None = None


def probe(path: MediaSource) -> MediaInfo:
    """
    What `path` holds, without decoding it. A cover picture in an audio file is not video.

    Where a container only estimates its duration (MP3, ADTS, MPEG-TS, live streams), all its packets are read.
    """
    with open_source(path) as (name, handle):
        kind = sniff(name, handle)
        if kind == "image":
            with Image.open(handle, formats=IMAGE_FORMATS) as image:
                return MediaInfo(name, "image", False, False, width=image.width, height=image.height)
        if kind == "audio":
            sounds = [
                (sound.frames / sound.samplerate, sound.samplerate, sound.channels) for sound in open_sounds(handle)
            ]
            return MediaInfo(name, "audio", True, False, sum(seconds for seconds, *_ in sounds), *sounds[0][1:])
        with open_container(name, handle) as container:
            audio, video = audio_stream(container), video_stream(container)
            info = {}
            if audio is not None:
                info |= {"sampling_rate": audio.codec_context.sample_rate, "channels": audio.codec_context.channels}
            if video is not None:
                info |= {"width": video.codec_context.width, "height": video.codec_context.height}
                info["frame_rate"] = float(video.average_rate) if video.average_rate else None
                info["picture_duration"] = declared_end(container, video)
            kind = "audio" if video is None else "video"
            duration = file_length(container, handle, name)
            return MediaInfo(name, kind, audio is not None, video is not None, duration, **info)


def load_audio(
    path: MediaSource, sampling_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """
    The sound of an audio or video file as a mono waveform `(samples,)` float32: channels averaged, rate set by soxr.

    Args:
        path: an audio file, or a video with a sound track.
        sampling_rate: rate of the result in Hz.
        start: seconds from the beginning of the file; in a video, from the beginning of its earlier track.
        duration: seconds to take, all that follows where absent; less is returned where the sound ends earlier.

    Raises:
        MediaError: no such file, nothing readable, no sound, a file cut off before the end of the excerpt, NaN
            samples, `start` outside the sound, or less than 0.1 s of it.
    """
    if start < 0 or (duration is not None and duration <= 0):
        raise MediaError(f"{source_name(path)}: start={start}, duration={duration}; give a start >= 0, a duration > 0")
    # Whole seconds fall on a sample at every rate, and the margin keeps the resampler's edges out of the excerpt, so
    # that an excerpt equals the same stretch of the whole.
    base = math.floor(max(0.0, start - RESAMPLING_MARGIN))
    end = math.inf if duration is None else start + duration + RESAMPLING_MARGIN
    with open_source(path) as (name, handle):
        chunks = read_sound(name, handle, sniff(name, handle), base, end)
        # a file that changes its sampling rate midway is resampled part by part
        parts = groupby(chunks, key=lambda chunk: chunk[1])
        parts = [(np.concatenate([samples for samples, _ in part]), rate) for rate, part in parts]
    if not parts and base == 0:
        raise MediaError(f"{name}: holds no sound at all (zero length); record or export it again")
    if round((start - base) * sampling_rate) >= round(sum(len(part) * sampling_rate / rate for part, rate in parts)):
        raise MediaError(f"{name}: start={start:g} s lies outside the sound; give a start before its end")
    for part, _ in parts:
        check_finite(name, part)
    waveform = np.concatenate(
        [part if rate == sampling_rate else soxr.resample(part, rate, sampling_rate) for part, rate in parts]
    )
    waveform = waveform[round((start - base) * sampling_rate) :]
    if duration is not None:
        waveform = waveform[: round(duration * sampling_rate)]
    if len(waveform) < MIN_DURATION * sampling_rate:
        raise short_error(name, len(waveform) / sampling_rate)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def check_finite(name: str, samples: np.ndarray) -> None:
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: holds NaN or infinite samples; export the sound again, or drop it")


def short_error(name: str, seconds: float) -> MediaError:
    return MediaError(f"{name}: {seconds:.3f} s of sound is too short; give at least {MIN_DURATION} s")


def load_frames(
    path: MediaSource, times: float | Sequence[float], shorter_side: int | None = None
) -> list[Image.Image]:
    """
    The video frames shown at `times` (seconds from the beginning of the file), as RGB images in the order of `times`.

    The frame shown at t is the last one whose time stamp is not after t, or the first frame where t lies before it.
    The last frame stays until the file's end. Pixels are made square. Frames with a shorter side above `shorter_side`
    pixels are shrunk to it.

    Raises:
        MediaError: no such file, nothing readable, no picture, a time outside the video, or a file cut off before it.
    """
    times = [float(time) for time in np.atleast_1d(times)]
    ascending = sorted(set(times))
    with open_source(path) as (name, handle):
        kind = sniff(name, handle)
        if kind == "image":
            raise MediaError(f"{name}: is a still image, not a video; load it as an image")
        if kind == "audio":
            raise MediaError(f"{name}: holds sound only, no picture; use it as audio, or pass a video")
        shown = dict(zip(ascending, read_frames(name, handle, ascending, shorter_side), strict=True))
    return [shown[time] for time in times]


def load_image(path: MediaSource, shorter_side: int | None = None) -> Image.Image:
    """
    A still image in RGB, upright as its EXIF data says; shrunk where its shorter side has more than `shorter_side`
    pixels.

    Transparent pixels lie on white. Pictures of 16 or more bits and of floats are scaled to 8 bits.

    Raises:
        MediaError: no such file, not an image, or one cut off in the middle.
    """
    with open_source(path) as (name, handle):
        if sniff(name, handle) != "image":
            info = probe(path if not hasattr(path, "read") else handle)
            remedy = "take a frame of it instead" if info.has_video else "use it as audio instead"
            raise MediaError(f"{name}: is {info.kind}, not a still image; {remedy}")
        return read_image(name, handle, shorter_side)
