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
from av.container import InputContainer as Container
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION


MediaSource = str | os.PathLike | bytes | BinaryIO | Mapping

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# A playlist or a text file that FFmpeg would follow or draw is not media: only real containers are opened.
CONTAINERS = (
    "mov,matroska,ogg,mp3,wav,w64,flac,aac,aiff,au,caf,ac3,eac3,amr,wv,ape,avi,mpegts,mpeg,mpegvideo,flv,asf,rm,dv,ivf"
)
# Containers whose tables give exact durations and positions. Elsewhere (MP3, MPEG-TS) both are estimates: nothing is
# concluded from a duration, and a position is reached by decoding from the start.
INDEXED_CONTAINERS = ("mov", "matroska")
CUT_TOLERANCE = 0.25  # seconds missing at the end that are codec delay and rounding, not a cut
SEEK_GAP = 10.0  # seconds; where keyframes are unknown, a shorter way is decoded rather than sought
TIME_ROUNDING = 1e-6  # seconds
RESAMPLING_MARGIN = 0.1  # seconds


class MediaError(ValueError):
    """A media file that cannot give what was asked of it; one line with the file, the trouble and the remedy."""


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
        with _open_container(name, handle) as container:
            audio, video = _audio_stream(container), _video_stream(container)
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
        read = _read_soundfile if kind == "audio" else _read_container
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


def load_frames(path: MediaSource, times: float | Sequence[float]) -> list[Image.Image]:
    """
    The video frames shown at `times` (seconds from the beginning of the file), as RGB images in the order of `times`.

    The frame shown at t is the last one whose time stamp is not after t, or the first frame where t lies before it.

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
        with _open_container(name, handle) as container:
            stream = _video_stream(container)
            if stream is None:
                raise MediaError(f"{name}: holds sound only, no picture; use it as audio, or pass a video")
            length = None if container.duration is None else container.duration / av.time_base
            for time in times:
                if not 0 <= time <= (math.inf if length is None else length + TIME_ROUNDING):
                    known = "" if length is None else f", which lasts {length:.3f} s"
                    raise MediaError(f"{name}: time {time:g} s lies outside the video{known}; ask for one inside it")
            shown = _frames_shown(name, container, stream, sorted(set(times)))
    return [shown[time] for time in times]


def load_image(path: MediaSource) -> Image.Image:
    """
    A still image in RGB, upright as its EXIF data says.

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
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"{name}: is damaged ({_one_line(error)}); download or export it again") from error


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
        raise _cut_error(name, start + len(samples) / rate, length / rate)
    return samples.mean(axis=1), rate


def _cut_error(name: str, reached: float, declared: float) -> MediaError:
    return MediaError(f"{name}: is cut off at {reached:.2f} s of {declared:.2f} s; download or export it again")


@contextmanager
def _open_container(name: str, handle: BinaryIO) -> Iterator[Container]:
    try:
        container = av.open(handle, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{name}: is no readable audio, image or video file (text, or cut off?); download or export it again"
        ) from error
    with container:
        if _audio_stream(container) is None and _video_stream(container) is None:
            raise MediaError(f"{name}: holds neither sound nor picture; give an audio, image or video file")
        yield container


def _audio_stream(container: Container) -> av.AudioStream | None:
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def _video_stream(container: Container) -> av.VideoStream | None:
    """The first moving picture: covers and thumbnails are attached pictures."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = (stream for stream in container.streams.video if stream.codec_context is not None)
    return next((stream for stream in streams if not stream.disposition & covers), None)


def _is_indexed(container: Container) -> bool:
    return container.format.name.startswith(INDEXED_CONTAINERS)


def _origin(container: Container) -> float:
    """The time stamp of the file's beginning, common to its tracks."""
    return (container.start_time or 0) / av.time_base


def _declared_end(container: Container, stream: av.stream.Stream) -> float | None:
    """Seconds from the beginning at which the track's own table says it ends, None where that is not known exactly."""
    if not _is_indexed(container):
        return None
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - _origin(container)
    hours, minutes, seconds = stream.metadata.get("DURATION", "nan:nan:nan").split(":")  # as Matroska's tags write it
    end = 3600 * float(hours) + 60 * float(minutes) + float(seconds) - _origin(container)
    return None if math.isnan(end) else end


def _decode(container: Container, stream: av.stream.Stream) -> Iterator[av.frame.Frame]:
    """The frames from here on. A damaged packet is passed over: whoever counts on what it held sees it missing."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # the file ends in the middle of a packet
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        yield from frames


def _seek(container: Container, stream: av.stream.Stream, time: float) -> None:
    container.seek(math.floor((time + _origin(container)) / stream.time_base), stream=stream)


def _read_container(name: str, handle: BinaryIO, start: int, end: float) -> tuple[np.ndarray, int]:
    """Mono samples from `start` to `end` (seconds) or to the sound's end, and their rate."""
    with _open_container(name, handle) as container:
        stream = _audio_stream(container)
        if stream is None:
            raise MediaError(f"{name}: is a video without sound; use its picture only, or pass a file with sound")
        origin, declared = _origin(container), _declared_end(container, stream)
        end = end if declared is None else min(end, declared)
        if end <= start:
            return np.zeros(0, np.float32), 1
        if start > SEEK_GAP and _is_indexed(container):
            _seek(container, stream, start - 1.0)  # ahead of the excerpt, so that the decoder has settled
        chunks, rate, begin, reached = [], 0, 0.0, 0.0
        for frame in _decode(container, stream):
            if not chunks:
                rate, begin = frame.sample_rate, 0.0 if frame.time is None else frame.time - origin
                reached = begin
            elif frame.sample_rate != rate:
                raise MediaError(f"{name}: changes its sampling rate midway; convert it to one rate first")
            chunks.append(_to_mono(frame))
            reached += len(chunks[-1]) / rate
            if reached >= end:
                break
    if declared is not None and end - reached > max(CUT_TOLERANCE, 0.02 * declared):
        raise _cut_error(name, reached, declared)
    if not chunks:
        return np.zeros(0, np.float32), 1
    # a sound track that begins later than the picture is silent until then
    lead = np.zeros(max(0, round((begin - start) * rate)), np.float32)
    waveform = np.concatenate([lead, *chunks])[max(0, round((start - begin) * rate)) :]
    return waveform if end == math.inf else waveform[: math.ceil((end - start) * rate)], rate


def _to_mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean of a frame's channels `(samples,)` float32; integer samples are scaled to [-1, 1]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(frame.samples, -1).T
    if np.issubdtype(samples.dtype, np.floating):
        return samples.mean(axis=0, dtype=np.float32)
    bits = 8 * samples.dtype.itemsize
    centre = 128 if samples.dtype == np.uint8 else 0
    return ((samples.mean(axis=0, dtype=np.float64) - centre) / 2 ** (bits - 1)).astype(np.float32)


def _frames_shown(
    name: str, container: Container, stream: av.VideoStream, times: list[float]
) -> dict[float, Image.Image]:
    """The image shown at each of the ascending times; decodes forward, and seeks where that passes frames over."""
    stream.thread_type = "AUTO"
    origin, declared = _origin(container), _declared_end(container, stream)
    frames, current, following = _restart(container, stream)
    shown = {}
    for time in times:
        position = 0.0 if current is None else current.time - origin
        if _is_indexed(container) and _next_keyframe_pays(container, stream, position, time):
            _seek(container, stream, time)
            frames, current, following = _restart(container, stream)
            if following is None or following.time - origin > time + TIME_ROUNDING:  # landed behind the time
                container.seek(container.start_time or 0)
                frames, current, following = _restart(container, stream)
        while following is not None and following.time - origin <= time + TIME_ROUNDING:
            current, following = following, next(frames, None)
        frame = current or following
        if frame is None:
            raise MediaError(f"{name}: its picture cannot be decoded; download or export it again")
        if following is None:
            length = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
            reached = frame.time - origin + length
            # the last frame stays until the track's end; beyond what was decoded there is only a cut
            if min(time, math.inf if declared is None else declared) - reached > CUT_TOLERANCE:
                raise _cut_error(name, reached, time if declared is None else declared)
        shown[time] = _to_image(frame)
    return shown


def _restart(container: Container, stream: av.VideoStream) -> tuple[Iterator, None, av.VideoFrame | None]:
    """The frames from here on: their iterator, none shown yet, and the one that follows."""
    frames = (frame for frame in _decode(container, stream) if frame.time is not None)
    following = next(frames, None)
    return frames, None, following


def _next_keyframe_pays(container: Container, stream: av.VideoStream, position: float, time: float) -> bool:
    """Whether the keyframe before `time` lies ahead of `position`, so that a seek spares decoding."""
    if not len(stream.index_entries):
        return time - position > SEEK_GAP
    index = stream.index_entries.search_timestamp(math.floor((time + _origin(container)) / stream.time_base))
    if index < 0:
        return False
    return float(stream.index_entries[index].timestamp * stream.time_base) - _origin(container) > position


def _to_image(frame: av.VideoFrame) -> Image.Image:
    """The frame in RGB, turned as its display matrix says (telephones record on their side)."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
