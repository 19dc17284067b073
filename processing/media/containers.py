"""Sound and frames out of containers (MP4, Matroska, MP3, ...), through PyAV, which brings FFmpeg's libraries."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer as Container
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image


# A playlist or a text file that FFmpeg would follow or draw is not media: only real containers are opened.
CONTAINERS = (
    "mov,matroska,ogg,mp3,wav,w64,flac,aac,aiff,au,caf,ac3,eac3,amr,wv,ape,avi,mpegts,mpeg,mpegvideo,flv,asf,rm,dv,ivf"
)
# Containers whose tables give exact durations and positions. Elsewhere (MP3, MPEG-TS) both are estimates: nothing is
# concluded from a duration, and a position is reached by decoding from the start.
INDEXED_CONTAINERS = ("mov", "matroska")
CUT_TOLERANCE = 0.25  # seconds missing at the end that are codec delay and rounding, not a cut
SEEK_GAP = 10.0  # seconds; where keyframes are unknown, a shorter way is decoded rather than sought
REORDERED = 4  # frames by which an index, in the order of decoding, may be ahead of the order of showing
FRAME_GAP = 0.2  # seconds; frames that lie farther apart are looked for once more, decoding every frame
TIME_ROUNDING = 1e-6  # seconds


class MediaError(ValueError):
    """A media file that cannot give what was asked of it; one line with the file, the trouble and the remedy."""


def cut_error(name: str, reached: float, declared: float) -> MediaError:
    return MediaError(f"{name}: is cut off at {reached:.2f} s of {declared:.2f} s; download or export it again")


@contextmanager
def open_container(name: str, handle: BinaryIO) -> Iterator[Container]:
    try:
        container = av.open(handle, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{name}: is no readable audio, image or video file (text, or cut off?); download or export it again"
        ) from error
    with container:
        if audio_stream(container) is None and video_stream(container) is None:
            raise MediaError(f"{name}: holds neither sound nor picture; give an audio, image or video file")
        yield container


def audio_stream(container: Container) -> av.AudioStream | None:
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def video_stream(container: Container) -> av.VideoStream | None:
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


def _decode(
    container: Container, stream: av.stream.Stream, is_wanted: Callable[[av.Packet], bool] | None = None
) -> Iterator[av.frame.Frame]:
    """
    The frames from here on. A damaged packet is passed over: whoever counts on what it held sees it missing.

    Args:
        is_wanted: whether a packet must give its frame; any other may be left out if nothing refers to it.
    """
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # the file ends in the middle of a packet
            return
        if packet is None:
            return
        if is_wanted is not None:
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted(packet) else "NONREF"
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        yield from frames


def _seek(container: Container, stream: av.stream.Stream, time: float) -> None:
    container.seek(math.floor((time + _origin(container)) / stream.time_base), stream=stream)


def read_container(name: str, handle: BinaryIO, start: int, end: float) -> tuple[np.ndarray, int]:
    """Mono samples from `start` to `end` (seconds) or to the sound's end, and their rate."""
    with open_container(name, handle) as container:
        stream = audio_stream(container)
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
            chunks.append(_samples(frame))
            reached += frame.samples / rate
            if reached >= end:
                break
    if declared is not None and end - reached > max(CUT_TOLERANCE, 0.02 * declared):
        raise cut_error(name, reached, declared)
    if not chunks:
        return np.zeros(0, np.float32), 1
    # a sound track that begins later than the picture is silent until then
    lead = np.zeros(max(0, round((begin - start) * rate)), np.float32)
    sound = _to_mono(np.concatenate(chunks, axis=1))
    waveform = np.concatenate([lead, sound])[max(0, round((start - begin) * rate)) :]
    return waveform if end == math.inf else waveform[: math.ceil((end - start) * rate)], rate


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """A frame's samples `(channels, samples)`."""
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T


def _to_mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels `(samples,)` float32; integer samples are scaled to [-1, 1]."""
    if np.issubdtype(samples.dtype, np.floating):
        return samples.mean(axis=0, dtype=np.float32)
    bits = 8 * samples.dtype.itemsize
    centre = 128 if samples.dtype == np.uint8 else 0
    return ((samples.mean(axis=0, dtype=np.float64) - centre) / 2 ** (bits - 1)).astype(np.float32)


def frames_shown(
    name: str,
    container: Container,
    stream: av.VideoStream,
    times: list[float],
    shorter_side: int | None = None,
    sparing: bool = True,
) -> dict[float, Image.Image]:
    """
    The image shown at each of the ascending times; decodes forward, and seeks where that passes frames over.

    Args:
        shorter_side: see `load_frames`.
        sparing: leave frames out that no other refers to and that lie more than FRAME_GAP before the next time. Where
            the frame shown lies there too, a later one may have been left out, and all is done again without.
    """
    if not stream.codec_context.is_open:
        stream.codec_context.thread_count = 1  # who has several cores has several clips to decode
    origin, declared = _origin(container), _declared_end(container, stream)

    def is_wanted(packet: av.Packet) -> bool:
        if packet.pts is None:
            return True
        position = float(packet.pts * packet.time_base) - origin
        following = bisect_left(times, position - TIME_ROUNDING)
        return following < len(times) and times[following] - position <= FRAME_GAP

    is_wanted = is_wanted if sparing and _is_indexed(container) else None
    frames, current, following = _restart(container, stream, is_wanted)
    shown, reformatter = {}, VideoReformatter()
    for time in times:
        position = 0.0 if current is None else current.time - origin
        # A keyframe closer to `time` may be shown after it.
        sought = time - REORDERED / float(stream.average_rate or 25)
        if _is_indexed(container) and _next_keyframe_pays(container, stream, position, sought):
            _seek(container, stream, sought)
            frames, current, following = _restart(container, stream, is_wanted)
            if following is None or following.time - origin > time + TIME_ROUNDING:  # landed behind the time
                container.seek(container.start_time or 0)
                frames, current, following = _restart(container, stream, is_wanted)
        while following is not None and following.time - origin <= time + TIME_ROUNDING:
            current, following = following, next(frames, None)
        frame = current or following
        if frame is None:
            raise MediaError(f"{name}: its picture cannot be decoded; download or export it again")
        if is_wanted is not None and frame.time - origin < time - FRAME_GAP:
            container.seek(container.start_time or 0)
            stream.codec_context.skip_frame = "DEFAULT"
            return frames_shown(name, container, stream, times, shorter_side, sparing=False)
        if following is None:
            length = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
            reached = frame.time - origin + length
            # the last frame stays until the track's end; beyond what was decoded there is only a cut
            if min(time, math.inf if declared is None else declared) - reached > CUT_TOLERANCE:
                raise cut_error(name, reached, time if declared is None else declared)
        shown[time] = _to_image(frame, shorter_side, reformatter)
    return shown


def _restart(
    container: Container, stream: av.VideoStream, is_wanted: Callable[[av.Packet], bool] | None
) -> tuple[Iterator, None, av.VideoFrame | None]:
    """The frames from here on: their iterator, none shown yet, and the one that follows."""
    frames = (frame for frame in _decode(container, stream, is_wanted) if frame.time is not None)
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


def shrunken_size(width: int, height: int, shorter_side: int | None) -> tuple[int, int]:
    scale = 1.0 if shorter_side is None else min(1.0, shorter_side / min(width, height))
    return round(scale * width), round(scale * height)


def _to_image(frame: av.VideoFrame, shorter_side: int | None, reformatter: VideoReformatter) -> Image.Image:
    """The frame in RGB, shrunk, and turned as its display matrix says (telephones record on their side)."""
    (width, height), rotation = shrunken_size(frame.width, frame.height, shorter_side), frame.rotation
    if width < frame.width:
        # Scaled first where it has fewer values a pixel: that takes half the time.
        kind = frame.format.name if frame.format.name.startswith("yuv") else "rgb24"
        frame = reformatter.reformat(frame, width, height, kind, interpolation="BICUBIC", threads=1)
    image = frame.to_image()
    return image.rotate(rotation, expand=True) if rotation else image
