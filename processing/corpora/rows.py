"""Reading the sound and frames of corpus rows, from bytes or files (columns: see `dali_llava.processing.corpora`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from dali_llava.processing.media import MediaError, load_audio, load_clip_frames, load_frames, load_image, probe

from .members import read_member


TIME_ROUNDING = 0.002  # seconds; containers keep milliseconds
END_TOLERANCE = 1.0  # seconds that a sound may end before its clip, because published ends are rounded


def open_audio(row: Mapping[str, Any], sampling_rate: int = 16000) -> np.ndarray:
    """
    The sound of a clip, (samples,) float32 mono at `sampling_rate` Hz.

    A file is cut to [start, end). Bytes contain only the clip and are not cut.

    Raises:
        MediaError: the row has no sound, `load_audio` rejects the file, or the clip starts after its file or ends more
            than `END_TOLERANCE` after it. The sound of a video may end before its picture. The message names the id.
    """
    with _naming(row):
        if row["audio"] is None:
            raise MediaError("the row has no sound; load the corpus with missing='skip', or add the file")
        audio = read_member(row["audio"])
        if audio["bytes"] is not None:
            return load_audio(audio, sampling_rate)
        start, end = row["start"] or 0.0, row["end"]
        length = probe(audio).duration if start > 0 else None
        try:
            waveform = load_audio(audio, sampling_rate, start, None if end is None else end - start)
        except MediaError as error:
            known = "" if length is None else f" (the file lasts {length:.2f} s)"
            raise MediaError(f"{error}{known}") from error
        reached = start + len(waveform) / sampling_rate
        if end is not None and reached < end - END_TOLERANCE and not _lasts(audio, end):
            raise MediaError(
                f"{audio['path']}: the clip ends at {end:g} s, its sound at {reached:.2f} s; correct `end`"
            )
        return waveform


def open_frames(
    row: Mapping[str, Any],
    seconds: Sequence[int] | None = None,
    most: int | None = None,
    shorter_side: int | None = None,
) -> list[Image.Image]:
    """
    The first frame of each second of a clip, as RGB images.

    Pictures are returned as they are. The frames of a video are those at start, start + 1, ... up to `end` or the end
    of the video; a final part of less than half a second is ignored. If the picture ends before the sound, the frames
    end with the picture. A clip that starts after the end of the picture has its last frame.

    Args:
        row: a row of a corpus.
        seconds: indices of the frames to open, in order; all frames by default.
        most: maximum number of frames to open, from the first; only without `seconds`.
        shorter_side: length in pixels of the shorter side; larger frames are shrunk to it.

    Raises:
        MediaError: the row has no frames, a file cannot be read, the clip starts after its video, or an index is out
            of range. The message names the id.
    """
    with _naming(row):
        count, start, _ = _frames(row)
        if seconds is None:
            seconds = range(_known(count, row) if most is None else int(min(count, most)))
        for second in seconds:
            if not 0 <= second < count:
                raise MediaError(f"has no second {second}; it has {count}, counted from 0")
        if start is None:
            return [load_image(read_member(row["frames"][second]), shorter_side) for second in seconds]
        return load_frames(row["frames"][0], [start + second for second in seconds], shorter_side)


def count_frames(row: Mapping[str, Any]) -> int:
    """
    The number of frames that `open_frames` returns, without decoding them.

    Raises:
        MediaError: the row has no frames, the video cannot be read or declares no duration, or the clip starts after
            its video. The message names the id.
    """
    with _naming(row):
        return _known(_frames(row)[0], row)


def open_middle_frame(row: Mapping[str, Any]) -> Image.Image:
    """
    The middle frame of a clip as an RGB image: the sixth of ten, as in the reference evaluation.

    Raises:
        MediaError: see `open_frames`.
    """
    return open_frames(row, [count_frames(row) // 2])[0]


def open_clip_frames(
    row: Mapping[str, Any], num_frames: int, frame_rate: float, shorter_side: int | None = None
) -> list[Image.Image]:
    """
    Frames that are spread evenly over a clip, as RGB images. One frame is that of `open_middle_frame`.

    The arguments are `frame_options` of a processor.

    Args:
        row: a row of a corpus.
        num_frames: maximum number of frames. A clip with fewer pictures has all of them.
        frame_rate: maximum number of frames per second of a video, see `frame_times`. Pictures have no rate.
        shorter_side: length in pixels of the shorter side; larger frames are shrunk to it.

    Raises:
        MediaError: see `open_frames`.
    """
    if num_frames == 1:
        return [open_middle_frame(row)]
    with _naming(row):
        count, start, end = _frames(row)
        if start is not None:
            _known(count, row)
            return load_clip_frames(row["frames"][0], start, end, num_frames, frame_rate, shorter_side)
    shown = min(num_frames, count)
    return open_frames(row, [(2 * i + 1) * count // (2 * shown) for i in range(shown)], shorter_side=shorter_side)


def _frames(row: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """The number of frames of a row (infinity if unknown), and the start and end of its video, None for pictures."""
    frames = row["frames"]
    if not frames:
        raise MediaError("the row has no frames; add a video or pictures")
    if len(frames) > 1:
        return len(frames), None, None
    source = read_member(frames[0])
    info = probe(source)
    if info.kind == "image":
        return 1, None, None
    start, end = (0.0, None) if source["bytes"] is not None else (row["start"] or 0.0, row["end"])
    if info.duration is not None and start >= info.duration:
        raise MediaError(f"{source['path']}: the clip starts at {start:g} s, the video ends at {info.duration:.2f} s")
    end = min(math.inf if time is None else time for time in (end, info.duration))
    count = math.inf if end == math.inf else math.floor(end - start + 0.5)
    if info.picture_duration is not None:
        count = min(count, math.ceil(info.picture_duration - start - TIME_ROUNDING))
        end = max(start, min(end, info.picture_duration))
    return max(1, count), start, end


def _lasts(source: Mapping[str, Any], end: float) -> bool:
    """Whether the picture of a file lasts until `end`."""
    info = probe(source)
    return info.has_video and info.duration is not None and info.duration >= end - END_TOLERANCE


def _known(count: float, row: Mapping[str, Any]) -> int:
    if count == math.inf:
        path = row["frames"][0]["path"]
        raise MediaError(f"{path}: declares no duration; set the end of the clip, or pass seconds=")
    return int(count)


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Prefix media errors with the id of the row."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"clip {row['id']!r}: {error}") from error
