"""Streams, positions and lengths of containers (MP4, Matroska, MP3, ...), read with PyAV, which includes FFmpeg."""

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
from av.container import InputContainer as Container
from av.stream import Disposition

from .source import MediaError


# Only real containers are opened: FFmpeg would follow the links of a playlist and render a text file.
CONTAINERS = (
    "mov,matroska,ogg,mp3,wav,w64,flac,aac,aiff,au,caf,ac3,eac3,amr,wv,ape,avi,mpegts,mpeg,mpegvideo,flv,asf,rm,dv,ivf"
)
# Containers with tables of exact durations and positions. Other containers (MP3, MPEG-TS) only give estimates: their
# durations are not trusted, and a position is reached by decoding from the start.
INDEXED_CONTAINERS = ("mov", "matroska")
CUT_TOLERANCE = 0.25  # seconds; up to this much may be missing at the end because of codec delay and rounding
LONGEST_PACKET = 60.0  # seconds; longer ones are negative lengths at the links of a chained Ogg file
# Cover pictures, thumbnails, and streams that are parts of a picture.
NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


def cut_error(name: str, reached: float, declared: float | None) -> MediaError:
    known = "" if declared is None else f" of {declared:.2f} s"
    return MediaError(f"{name}: is cut off at {reached:.2f} s{known}; download or export it again")


@contextmanager
def open_container(name: str, handle: BinaryIO) -> Iterator[Container]:
    """
    Open the container that starts at the beginning of the handle.

    Raises:
        MediaError: if FFmpeg cannot read it, or it has no sound and no picture.
    """
    handle.seek(0)
    try:
        container = av.open(handle, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{name}: is not a readable audio, image or video file (text, or cut off?); download or export it again"
        ) from error
    with container:
        if audio_stream(container) is None and video_stream(container) is None:
            raise MediaError(f"{name}: has no sound and no picture; give an audio, image or video file")
        yield container


def audio_stream(container: Container) -> av.AudioStream | None:
    """Return the sound track that players choose: the default one, or the first if none is the default."""
    return _default(stream for stream in container.streams.audio if stream.codec_context is not None)


def video_stream(container: Container) -> av.VideoStream | None:
    """Return the default video track, or the first if none is the default. Covers and thumbnails do not count."""
    streams = (stream for stream in container.streams.video if stream.codec_context is not None)
    return _default(stream for stream in streams if not stream.disposition & NO_VIDEO)


def _default(streams: Iterator[av.stream.Stream]) -> av.stream.Stream | None:
    streams = list(streams)
    return next((stream for stream in streams if stream.disposition & Disposition.default), next(iter(streams), None))


def is_indexed(container: Container) -> bool:
    return container.format.name.startswith(INDEXED_CONTAINERS)


def origin_of(container: Container) -> float:
    """Return the time stamp in seconds at which the file starts. It is the same for all tracks."""
    return (container.start_time or 0) / av.time_base


def declared_end(container: Container, stream: av.stream.Stream) -> float | None:
    """Return the end of a track in seconds, as declared by its own table; None if that is not known exactly."""
    if not is_indexed(container):
        return None
    if not container.format.name.startswith("matroska"):
        if stream.duration is None:
            return None
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin_of(container)
    # In Matroska, only a tag gives the length of a track: FFmpeg sets `stream.duration` to the length of the file.
    tag = next((value for key, value in stream.metadata.items() if key.upper().startswith("DURATION")), "")
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag.strip())
    if match is None:
        return None
    hours, minutes, seconds = map(float, match.groups())
    return 3600 * hours + 60 * minutes + seconds - origin_of(container)


def file_length(container: Container, handle: BinaryIO, name: str) -> float | None:
    """
    Return the end of the longest track in seconds.

    If the container only estimates it, every packet is read, without decoding. None if the packets have no times
    either.
    """
    declared = None if container.duration is None else container.duration / av.time_base
    if declared is not None and is_indexed(container):
        return declared
    position = handle.tell()
    with open_container(name, handle) as measured:  # a second demuxer, so that `container` keeps its position
        measured_length = _measure(measured)
    handle.seek(position)
    if declared is not None and measured_length is not None and abs(declared - measured_length) < CUT_TOLERANCE:
        return declared  # more exact: packets count padding as sound
    return measured_length


def _measure(container: Container) -> float | None:
    """Return the length in seconds of the packets of the sound and the picture."""
    origin, sound, last = origin_of(container), 0.0, 0.0
    streams = [stream for stream in (audio_stream(container), video_stream(container)) if stream is not None]
    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            break
        if packet is None:
            break
        length = float((packet.duration or 0) * packet.time_base)
        if length > LONGEST_PACKET:
            length = 0.0
        if packet.stream.type == "audio":
            sound += length  # in a chained Ogg file, time stamps restart at each link
        if packet.pts is not None:
            last = max(last, float(packet.pts * packet.time_base) + length - origin)
    return max(sound, last) or None


def is_truncated(handle: BinaryIO) -> bool:
    """Whether a Matroska or MP4 file is shorter than its outermost elements declare: its end is missing."""
    position = handle.tell()
    try:
        size = handle.seek(0, io.SEEK_END)
        handle.seek(0)
        if handle.read(4) == b"\x1aE\xdf\xa3":
            return _matroska_end(handle) > size
        end = 0
        while end < size:
            handle.seek(end)
            head = handle.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8:  # 0: the last box reaches to the end
                return False
            end += length
        return end > size
    finally:
        handle.seek(position)


def _matroska_end(handle: BinaryIO) -> int:
    """Return the byte at which the segment ends; 0 for a live stream, which leaves the size open."""

    def read_size() -> int | None:
        first = handle.read(1)
        if not first or not first[0]:
            return None
        extra = 8 - first[0].bit_length()
        value = int.from_bytes(first + handle.read(extra), "big") - (1 << 7 * (extra + 1))
        return None if value == (1 << 7 * (extra + 1)) - 1 else value

    header = read_size()
    if header is None:
        return 0
    handle.seek(header, io.SEEK_CUR)
    if handle.read(4) != b"\x18S\x80g":
        return 0
    segment = read_size()
    return 0 if segment is None else handle.tell() + segment


def decode(
    container: Container, stream: av.stream.Stream, is_wanted: Callable[[av.Packet], bool] | None = None
) -> Iterator[av.frame.Frame]:
    """
    Yield the frames from the current position. Damaged packets are skipped, so their frames are missing.

    Args:
        is_wanted: returns whether the frame of a packet is needed. Other frames are skipped if no frame refers to
            them.
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


def seek(container: Container, stream: av.stream.Stream, time: float) -> None:
    container.seek(math.floor((time + origin_of(container)) / stream.time_base), stream=stream)
