"""Containers (MP4, Matroska, MP3, ...) through PyAV, which brings FFmpeg's libraries: streams, positions, lengths."""

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


# A playlist or a text file that FFmpeg would follow or draw is not media: only real containers are opened.
CONTAINERS = (
    "mov,matroska,ogg,mp3,wav,w64,flac,aac,aiff,au,caf,ac3,eac3,amr,wv,ape,avi,mpegts,mpeg,mpegvideo,flv,asf,rm,dv,ivf"
)
# Containers whose tables give exact durations and positions. Elsewhere (MP3, MPEG-TS) both are estimates: nothing is
# concluded from a duration, and a position is reached by decoding from the start.
INDEXED_CONTAINERS = ("mov", "matroska")
CUT_TOLERANCE = 0.25  # seconds missing at the end that are codec delay and rounding, not a cut
LONGEST_PACKET = 60.0  # seconds; where a chained Ogg file goes on, FFmpeg gives a negative number, read as unsigned
# Pictures beside the moving one, and parts of a picture.
NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


def cut_error(name: str, reached: float, declared: float | None) -> MediaError:
    known = "" if declared is None else f" of {declared:.2f} s"
    return MediaError(f"{name}: is cut off at {reached:.2f} s{known}; download or export it again")


@contextmanager
def open_container(name: str, handle: BinaryIO) -> Iterator[Container]:
    """
    The container at the handle's beginning.

    Raises:
        MediaError: nothing that FFmpeg reads, or neither sound nor picture in it.
    """
    handle.seek(0)
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
    """The default sound track, as players choose it, or the first."""
    return _default(stream for stream in container.streams.audio if stream.codec_context is not None)


def video_stream(container: Container) -> av.VideoStream | None:
    """The default moving picture, or the first: covers and thumbnails are attached pictures."""
    streams = (stream for stream in container.streams.video if stream.codec_context is not None)
    return _default(stream for stream in streams if not stream.disposition & NO_VIDEO)


def _default(streams: Iterator[av.stream.Stream]) -> av.stream.Stream | None:
    streams = list(streams)
    return next((stream for stream in streams if stream.disposition & Disposition.default), next(iter(streams), None))


def is_indexed(container: Container) -> bool:
    return container.format.name.startswith(INDEXED_CONTAINERS)


def origin_of(container: Container) -> float:
    """The time stamp of the file's beginning, common to its tracks."""
    return (container.start_time or 0) / av.time_base


def declared_end(container: Container, stream: av.stream.Stream) -> float | None:
    """Seconds from the beginning at which the track's own table says it ends, None where that is not known exactly."""
    if not is_indexed(container):
        return None
    if not container.format.name.startswith("matroska"):
        if stream.duration is None:
            return None
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin_of(container)
    # Matroska gives a track's length in a tag alone: FFmpeg fills `stream.duration` in from the file's.
    tag = next((value for key, value in stream.metadata.items() if key.upper().startswith("DURATION")), "")
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag.strip())
    if match is None:
        return None
    hours, minutes, seconds = map(float, match.groups())
    return 3600 * hours + 60 * minutes + seconds - origin_of(container)


def file_length(container: Container, handle: BinaryIO, name: str) -> float | None:
    """
    Seconds to the end of the longest track: declared, or, where containers only estimate it, measured by reading every
    packet without decoding any. None where not even the packets tell.
    """
    declared = None if container.duration is None else container.duration / av.time_base
    if declared is not None and is_indexed(container):
        return declared
    position = handle.tell()
    with open_container(name, handle) as measured:  # its own demuxer: `container` keeps its place
        measured_length = _measure(measured)
    handle.seek(position)
    if declared is not None and measured_length is not None and abs(declared - measured_length) < CUT_TOLERANCE:
        return declared  # it knows about padding, which packets count as sound
    return measured_length


def _measure(container: Container) -> float | None:
    """Seconds that the packets of the sound and the picture last."""
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
            sound += length  # in a chained Ogg file time stamps start again
        if packet.pts is not None:
            last = max(last, float(packet.pts * packet.time_base) + length - origin)
    return max(sound, last) or None


def is_truncated(handle: BinaryIO) -> bool:
    """Whether a Matroska or MP4 file is shorter than its outermost elements say: bytes are missing at its end."""
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
    """The byte at which the segment ends, 0 where a live stream leaves it open."""

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


def seek(container: Container, stream: av.stream.Stream, time: float) -> None:
    container.seek(math.floor((time + origin_of(container)) / stream.time_base), stream=stream)
