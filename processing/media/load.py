"""
Load sound, frames and images from media files: plain audio with soundfile, the rest with PyAV and its own FFmpeg.

Every function takes a path, bytes, a binary file object, or a `{"path", "bytes"}` row of a `datasets` column. The
content decides how a file is read, never its extension. Invalid input raises a [`MediaError`] with a message of one
line.
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
from .frames import frame_times, read_frames
from .images import read_image
from .ogg import open_sounds
from .sound import read_sound
from .source import IMAGE_FORMATS, MediaError, MediaSource, open_source, sniff, source_name


RESAMPLING_MARGIN = 0.1  # seconds


@dataclass(frozen=True)
class MediaInfo:
    """
    The content of a media file.

    Attributes:
        kind: "audio", "image" or "video".
        duration: end of the longest track in seconds; None if the packets have no times either.
        picture_duration: end of the picture track of a video in seconds, if its table declares it. If the picture ends
            before the sound, its last frame stays.
        width, height: size in stored pixels, which may not be square.
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
    Return the content of a file without decoding it. A cover picture in an audio file does not count as video.

    If the container only estimates its duration (MP3, ADTS, MPEG-TS, live streams), all packets are read.
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
    Load the sound of a file as a mono waveform `(samples,)` float32, with averaged channels, resampled by soxr.

    Args:
        path: an audio file, or a video with a sound track.
        sampling_rate: sampling rate of the waveform in Hz.
        start: start of the excerpt in seconds from the beginning of the file, which in a video is the start of the
            track that starts first.
        duration: length of the excerpt in seconds; by default, everything after `start`. The excerpt is shorter if the
            sound ends earlier.

    Raises:
        MediaError: if the file does not exist, is not readable, has no sound, is cut off before the end of the
            excerpt, or contains NaN samples; if `start` is outside the sound; or if the excerpt is shorter than 0.1 s.
    """
    if start < 0 or (duration is not None and duration <= 0):
        raise MediaError(f"{source_name(path)}: start={start}, duration={duration}; give a start >= 0, a duration > 0")
    # A whole second is a whole number of samples at every rate, and the margin keeps the edge effects of the resampler
    # out of the excerpt, so an excerpt equals the same part of the whole file.
    base = math.floor(max(0.0, start - RESAMPLING_MARGIN))
    end = math.inf if duration is None else start + duration + RESAMPLING_MARGIN
    with open_source(path) as (name, handle):
        chunks = read_sound(name, handle, sniff(name, handle), base, end)
        # if the sampling rate changes midway, each part is resampled separately
        parts = groupby(chunks, key=lambda chunk: chunk[1])
        parts = [(np.concatenate([samples for samples, _ in part]), rate) for rate, part in parts]
    if not parts and base == 0:
        raise MediaError(f"{name}: contains no sound (zero length); record or export it again")
    if round((start - base) * sampling_rate) >= round(sum(len(part) * sampling_rate / rate for part, rate in parts)):
        raise MediaError(f"{name}: start={start:g} s is outside the sound; give a start before its end")
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
        raise MediaError(f"{name}: contains NaN or infinite samples; export the sound again, or remove the file")


def short_error(name: str, seconds: float) -> MediaError:
    return MediaError(f"{name}: {seconds:.3f} s of sound is too short; give at least {MIN_DURATION} s")


def load_frames(
    path: MediaSource, times: float | Sequence[float], shorter_side: int | None = None
) -> list[Image.Image]:
    """
    Load the video frames shown at `times` (seconds from the beginning of the file) as RGB images, in the same order.

    The frame shown at t is the last frame with a time stamp of at most t, or the first frame if t is before it. The
    last frame stays until the end of the file. Pixels are made square. Frames with a shorter side of more than
    `shorter_side` pixels are shrunk to that size.

    Raises:
        MediaError: if the file does not exist, is not readable, has no picture or is cut off before a time, or if a
            time is outside the video.
    """
    times = [float(time) for time in np.atleast_1d(times)]
    ascending = sorted(set(times))
    with open_source(path) as (name, handle):
        kind = sniff(name, handle)
        if kind == "image":
            raise MediaError(f"{name}: is a still image, not a video; load it as an image")
        if kind == "audio":
            raise MediaError(f"{name}: contains sound only, no picture; use it as audio, or pass a video")
        shown = dict(zip(ascending, read_frames(name, handle, ascending, shorter_side), strict=True))
    return [shown[time] for time in times]


def load_clip_frames(
    path: MediaSource,
    start: float = 0.0,
    end: float | None = None,
    num_frames: int = 1,
    frame_rate: float = 2.0,
    shorter_side: int | None = None,
) -> list[Image.Image]:
    """
    Load frames that are spread evenly over a part of a video, decoded in one pass; see `frame_times`.

    Args:
        path: a video.
        start, end: the part in seconds. By default, it ends with the video. If the length of the video is unknown, the
            only frame is the one at `start`.
        num_frames: maximum number of frames; 1 is the middle frame.
        frame_rate: maximum number of frames per second.
        shorter_side: see `load_frames`.

    Raises:
        MediaError: see `load_frames`; or if `end` is before `start`.
    """
    end = probe(path).duration if end is None else end
    end = start if end is None else end
    if end < start:
        raise MediaError(f"{source_name(path)}: start={start:g} s is after the end, {end:g} s; give a start before it")
    return load_frames(path, frame_times(start, end, num_frames, frame_rate), shorter_side)


def load_image(path: MediaSource, shorter_side: int | None = None) -> Image.Image:
    """
    Load a still image in RGB, rotated upright according to its EXIF data.

    If its shorter side has more than `shorter_side` pixels, the image is shrunk to that size. Transparent images are
    composited on white. Images of 16 or more bits and of floats are scaled to 8 bits.

    Raises:
        MediaError: if the file does not exist, is not an image, or is cut off.
    """
    with open_source(path) as (name, handle):
        if sniff(name, handle) != "image":
            info = probe(path if not hasattr(path, "read") else handle)
            remedy = "load a frame of it instead" if info.has_video else "use it as audio instead"
            raise MediaError(f"{name}: is {info.kind}, not a still image; {remedy}")
        return read_image(name, handle, shorter_side)
