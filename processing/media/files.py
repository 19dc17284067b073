"""
Sound, frames and images out of media files: soundfile for plain audio, PyAV (with its own FFmpeg) for the rest.

Every function takes a path, bytes, a binary file object, or a `{"path", "bytes"}` row of a `datasets` column, and goes
by the content, never by the extension. Whatever is wrong with the input raises a [`MediaError`] of one line.
"""

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION

from .containers import (
    CUT_TOLERANCE,
    TIME_ROUNDING,
    MediaError,
    audio_stream,
    cut_error,
    frames_shown,
    open_container,
    read_container,
    shrunken_size,
    video_stream,
)


MediaSource = str | os.PathLike | bytes | BinaryIO | Mapping

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
RESAMPLING_MARGIN = 0.1  # seconds


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: `kind` is "audio", "image" or "video"; durations are in seconds, None where undeclared."""

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


def probe(path: MediaSource) -> MediaInfo:
    """What `path` holds, without decoding it. A cover picture in an audio file is not video."""
    with _open(path) as (name, handle):
        kind = _sniff(handle)
        if kind == "image":
            with Image.open(handle, formats=IMAGE_FORMATS) as image:
                return MediaInfo(name, "image", False, False, width=image.width, height=image.height)
        if kind == "audio":
            with soundfile.SoundFile(handle) as sound:
                duration = sound.frames / sound.samplerate
                return MediaInfo(name, "audio", True, False, duration, sound.samplerate, sound.channels)
        with open_container(name, handle) as container:
            audio, video = audio_stream(container), video_stream(container)
            duration = None if container.duration is None else container.duration / av.time_base
            info = {}
            if audio is not None:
                info |= {"sampling_rate": audio.codec_context.sample_rate, "channels": audio.codec_context.channels}
            if video is not None:
                info |= {"width": video.codec_context.width, "height": video.codec_context.height}
                info["frame_rate"] = float(video.average_rate) if video.average_rate else None
            kind = "audio" if video is None else "video"
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
        raise MediaError(f"{_name(path)}: start={start}, duration={duration}; give a start >= 0 and a duration > 0")
    # Whole seconds fall on a sample at every rate, and the margin keeps the resampler's edges out of the excerpt, so
    # that an excerpt equals the same stretch of the whole.
    base = math.floor(max(0.0, start - RESAMPLING_MARGIN))
    end = math.inf if duration is None else start + duration
    with _open(path) as (name, handle):
        kind = _sniff(handle)
        if kind == "image":
            raise MediaError(f"{name}: is a still image, without sound; use it as an image, or pass audio or video")
        read = _read_soundfile if kind == "audio" else read_container
        waveform, rate = read(name, handle, base, end + RESAMPLING_MARGIN)
    if len(waveform) == 0 and base == 0:
        raise MediaError(f"{name}: holds no sound at all (zero length); record or export it again")
    if round((start - base) * rate) >= len(waveform):
        raise MediaError(f"{name}: start={start:g} s lies outside the sound; give a start before its end")
    if not np.isfinite(waveform).all():
        raise MediaError(f"{name}: holds NaN or infinite samples; export the sound again, or drop it")
    if rate != sampling_rate:
        waveform = soxr.resample(waveform, rate, sampling_rate)
    waveform = waveform[round((start - base) * sampling_rate) :]
    if duration is not None:
        waveform = waveform[: round(duration * sampling_rate)]
    if len(waveform) < MIN_DURATION * sampling_rate:
        seconds = len(waveform) / sampling_rate
        raise MediaError(f"{name}: {seconds:.3f} s of sound is too short; give at least {MIN_DURATION} s")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def load_frames(
    path: MediaSource, times: float | Sequence[float], shorter_side: int | None = None
) -> list[Image.Image]:
    """
    The video frames shown at `times` (seconds from the beginning of the file), as RGB images in the order of `times`.

    The frame shown at t is the last one whose time stamp is not after t, or the first frame where t lies before it.
    Frames whose shorter side is above `shorter_side` pixels are shrunk to it.

    Raises:
        MediaError: no such file, nothing readable, no picture, a time outside the video, or a file cut off before it.
    """
    times = [float(time) for time in np.atleast_1d(times)]
    with _open(path) as (name, handle):
        kind = _sniff(handle)
        if kind == "image":
            raise MediaError(f"{name}: is a still image, not a video; load it as an image")
        if kind == "audio":
            raise MediaError(f"{name}: holds sound only, no picture; use it as audio, or pass a video")
        with open_container(name, handle) as container:
            stream = video_stream(container)
            if stream is None:
                raise MediaError(f"{name}: holds sound only, no picture; use it as audio, or pass a video")
            length = None if container.duration is None else container.duration / av.time_base
            for time in times:
                if not 0 <= time <= (math.inf if length is None else length + TIME_ROUNDING):
                    known = "" if length is None else f", which lasts {length:.3f} s"
                    raise MediaError(f"{name}: time {time:g} s lies outside the video{known}; ask for one inside it")
            shown = frames_shown(name, container, stream, sorted(set(times)), shorter_side)
    return [shown[time] for time in times]


def load_image(path: MediaSource, shorter_side: int | None = None) -> Image.Image:
    """
    A still image in RGB, upright as its EXIF data says; shrunk where its shorter side has more than `shorter_side`
    pixels.

    Raises:
        MediaError: no such file, not an image, or one cut off in the middle.
    """
    with _open(path) as (name, handle):
        kind = _sniff(handle)
        if kind != "image":
            info = probe(path if not hasattr(path, "read") else handle)
            remedy = "take a frame of it instead" if info.has_video else "use it as audio instead"
            raise MediaError(f"{name}: is {info.kind}, not a still image; {remedy}")
        try:
            with Image.open(handle, formats=IMAGE_FORMATS) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16-bit greyscale, which `convert` would clip to white
                    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"{name}: is damaged ({_one_line(error)}); download or export it again") from error
    size = shrunken_size(*image.size, shorter_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _name(source: MediaSource) -> str:
    if isinstance(source, Mapping):
        return source.get("path") or "<bytes>"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return "<bytes>" if isinstance(source, bytes) else str(getattr(source, "name", "<file>"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _open(source: MediaSource) -> Iterator[tuple[str, BinaryIO]]:
    """The name of the source and a seekable handle at its beginning."""
    name = _name(source)
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, bytes):
        handle = io.BytesIO(source)
    else:
        path = Path(source)
        if path.is_dir():
            raise MediaError(f"{name}: is a directory; give a media file")
        try:
            raw = io.FileIO(path)
        except FileNotFoundError as error:
            raise MediaError(f"{name}: no such file; check the path") from error
        except OSError as error:
            raise MediaError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error
        raw.name = "media"  # FFmpeg would weigh the extension against the content
        handle = io.BufferedReader(raw)
    with handle:
        if not handle.read(1):
            raise MediaError(f"{name}: is empty; download or export it again")
        handle.seek(0)
        yield name, handle


def _sniff(handle: BinaryIO) -> str:
    """Who reads it: "image" for Pillow, "audio" for soundfile, "container" for PyAV."""
    try:
        with Image.open(handle, formats=IMAGE_FORMATS):
            return "image"
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    finally:
        handle.seek(0)
    head = handle.read(12)
    handle.seek(0)
    # MP3 is left to FFmpeg: libsndfile's decoder writes to stderr on any unusual tag
    is_plain = head[:4] in (b"fLaC", b"OggS") or (head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE")
    if is_plain or (head[:4] == b"FORM" and head[8:11] == b"AIF"):
        try:
            with soundfile.SoundFile(handle) as sound:
                if sound.frames:  # libsndfile finds none in an Ogg file without its last page, where FFmpeg does
                    return "audio"
        except soundfile.SoundFileError:  # Theora in Ogg, a rare codec in WAV: FFmpeg may know it
            pass
        finally:
            handle.seek(0)
    return "container"


def _read_soundfile(name: str, handle: BinaryIO, start: int, end: float) -> tuple[np.ndarray, int]:
    """Mono samples from `start` to `end` (seconds) or to the sound's end, and their rate."""
    try:
        with soundfile.SoundFile(handle) as sound:
            rate, length = sound.samplerate, sound.frames
            first, last = min(start * rate, length), min(end * rate, length)
            sound.seek(first)
            samples = sound.read(math.ceil(last) - first, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise MediaError(f"{name}: is damaged ({_one_line(error)}); download or export it again") from error
    if last - first - len(samples) > CUT_TOLERANCE * rate:
        raise cut_error(name, start + len(samples) / rate, length / rate)
    return samples.mean(axis=1), rate
