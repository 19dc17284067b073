"""Read the frames of a video at ascending times: forward only, with a seek if that skips frames."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import av
from av.container import InputContainer as Container
from av.video.reformatter import VideoReformatter
from PIL import Image

from .containers import (
    CUT_TOLERANCE,
    cut_error,
    declared_end,
    decode,
    file_length,
    is_indexed,
    is_truncated,
    open_container,
    origin_of,
    seek,
    video_stream,
)
from .images import on_background, shrunken_size
from .source import MediaError


SEEK_GAP = 10.0  # seconds; if keyframes are unknown, shorter distances are decoded without a seek
REORDERED = 4  # frames by which an index, in decoding order, may be ahead of the display order
FRAME_GAP = 0.2  # seconds; if frames are farther apart, every frame is decoded
TIME_ROUNDING = 1e-6  # seconds
WIDEST_PIXEL = 16  # a sample aspect ratio above it, or below its inverse, is treated as an error in the file


def frame_times(start: float, end: float, num_frames: int = 1, frame_rate: float = 2.0) -> list[float]:
    """
    Return the times of frames that are spread evenly over a part of a video: the middles of parts of equal length.

    Args:
        start, end: the part of the video in seconds.
        num_frames: maximum number of frames; 1 is the middle frame.
        frame_rate: frames per second, as long as they are at most `num_frames`.

    Returns:
        Ascending times in seconds, at least one.

    Example:
        >>> frame_times(1.0, 3.0, num_frames=20)
        [1.25, 1.75, 2.25, 2.75]
        >>> frame_times(0.0, 60.0, num_frames=3)
        [10.0, 30.0, 50.0]
    """
    count = min(num_frames, max(1, round((end - start) * frame_rate)))
    return [start + (number + 0.5) * (end - start) / count for number in range(count)]


def read_frames(
    name: str, handle: BinaryIO, times: Sequence[float], shorter_side: int | None = None
) -> Iterator[Image.Image]:
    """
    Yield the image shown at each of the ascending `times`, from one decoder.

    Raises:
        MediaError: if there is no picture, a time is outside the video, or the file is cut off before it.
    """
    with open_container(name, handle) as container:
        stream = video_stream(container)
        if stream is None:
            raise MediaError(f"{name}: contains sound only, no picture; use it as audio, or pass a video")
        length = container.duration / av.time_base if container.duration and is_indexed(container) else None
        for time in times:
            if not 0 <= time <= (math.inf if length is None else length + TIME_ROUNDING):
                raise outside_error(name, time, length)
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1  # on several cores, several clips are decoded in parallel
        yield from _shown(name, container, handle, stream, times, shorter_side, sparing=is_indexed(container))


def outside_error(name: str, time: float, length: float | None) -> MediaError:
    known = "" if length is None else f", which lasts {length:.3f} s"
    return MediaError(f"{name}: time {time:g} s is outside the video{known}; pass a time inside it")


def _shown(
    name: str,
    container: Container,
    handle: BinaryIO,
    stream: av.VideoStream,
    times: Sequence[float],
    shorter_side: int | None,
    sparing: bool,
) -> Iterator[Image.Image]:
    """
    Yield the frames for `read_frames`.

    Args:
        sparing: skip frames that no other frame refers to and that are more than FRAME_GAP before the next time. If
            the frame shown is that early too, a later one may have been skipped, so the remaining times are read again
            without skipping.
    """
    origin = origin_of(container)

    def is_wanted(packet: av.Packet) -> bool:
        if packet.pts is None:
            return True
        position = float(packet.pts * packet.time_base) - origin
        following = bisect_left(times, position - TIME_ROUNDING)
        return following < len(times) and times[following] - position <= FRAME_GAP

    is_wanted = is_wanted if sparing else None
    frames, current, following = _restart(container, stream, is_wanted)
    reformatter, ended = VideoReformatter(), False
    for number, time in enumerate(times):
        position = 0.0 if current is None else current.time - origin
        # A keyframe closer to `time` may be shown after it.
        sought = time - REORDERED / float(stream.average_rate or 25)
        if not ended and is_indexed(container) and _next_keyframe_pays(container, stream, position, sought):
            seek(container, stream, sought)
            frames, current, following = _restart(container, stream, is_wanted)
            if following is None or following.time - origin > time + TIME_ROUNDING:  # the seek went past the time
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
            yield from _shown(name, container, handle, stream, times[number:], shorter_side, sparing=False)
            return
        if following is None and not ended:
            _check_end(name, container, handle, stream, frame, max(times))
            ended = True
        yield _to_image(frame, _pixel_ratio(stream), shorter_side, reformatter)


def _check_end(
    name: str, container: Container, handle: BinaryIO, stream: av.VideoStream, frame: av.VideoFrame, time: float
) -> None:
    """
    Check that the last frame may be shown until `time`.

    The last frame stays until the end of the file. It is an error if bytes of the file are missing, or if `time` is
    after the end.
    """
    length = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
    reached = frame.time - origin_of(container) + length
    if time - reached <= CUT_TOLERANCE:
        return
    declared = declared_end(container, stream)
    if declared is not None and min(time, declared) - reached > CUT_TOLERANCE:
        raise cut_error(name, reached, declared)
    if declared is None and is_indexed(container):
        whole = container.duration / av.time_base if container.duration else None
        if is_truncated(handle):
            raise cut_error(name, reached, whole)
    if container.duration is None or not is_indexed(container):
        whole = file_length(container, handle, name)
        if whole is not None and time > max(whole, reached) + CUT_TOLERANCE:
            raise outside_error(name, time, max(whole, reached))


def _restart(
    container: Container, stream: av.VideoStream, is_wanted: Callable[[av.Packet], bool] | None
) -> tuple[Iterator, None, av.VideoFrame | None]:
    """Return an iterator over the frames from the current position, None as the current frame, and the next frame."""
    frames = (frame for frame in decode(container, stream, is_wanted) if frame.time is not None)
    following = next(frames, None)
    return frames, None, following


def _next_keyframe_pays(container: Container, stream: av.VideoStream, position: float, time: float) -> bool:
    """Whether the keyframe before `time` is after `position`, so that a seek saves decoding."""
    if not len(stream.index_entries):
        return time - position > SEEK_GAP
    index = stream.index_entries.search_timestamp(math.floor((time + origin_of(container)) / stream.time_base))
    if index < 0:
        return False
    return float(stream.index_entries[index].timestamp * stream.time_base) - origin_of(container) > position


def _pixel_ratio(stream: av.VideoStream) -> float:
    """Return the ratio of a pixel's width to its height; 1 if it is unknown or implausible."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return ratio if 1 / WIDEST_PIXEL <= ratio <= WIDEST_PIXEL else 1.0


def _to_image(
    frame: av.VideoFrame, pixel_ratio: float, shorter_side: int | None, reformatter: VideoReformatter
) -> Image.Image:
    """
    Convert a frame to RGB with square pixels: shrunk, composited on the background, and rotated.

    The display matrix gives the rotation, since phones record videos sideways.
    """
    shown = max(1, round(frame.width * pixel_ratio)), frame.height
    (width, height), rotation = shrunken_size(*shown, shorter_side), frame.rotation
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
        image = on_background(image)
        image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    else:
        if (width, height) != (frame.width, frame.height):
            # Scaling before the conversion to RGB halves the time for YUV, which has fewer values per pixel.
            kind = frame.format.name if frame.format.name.startswith("yuv") else "rgb24"
            frame = reformatter.reformat(frame, width, height, kind, interpolation="BICUBIC", threads=1)
        image = frame.to_image()
    return image.rotate(rotation, expand=True) if rotation else image
