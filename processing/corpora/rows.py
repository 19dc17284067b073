"""The media of corpus rows: a clip's sound and its frames, in bytes or out of files (columns: see `load_corpus`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from dali_llava.processing.media import MediaError, load_audio, load_frames, load_image, probe

from .members import read_member


TIME_ROUNDING = 0.002  # seconds; containers keep milliseconds
END_TOLERANCE = 1.0  # seconds by which a sound may stop before its clip's end: published ends are rounded


def open_audio(row: Mapping[str, Any], sampling_rate: int = 16000) -> np.ndarray:
    """
    The sound of a clip, (samples,) float32 mono at `sampling_rate` Hz.

    A file is cut to [start, end); bytes hold the clip alone.

    Raises:
        MediaError: on a row without sound, a file that `load_audio` rejects, or a clip that lies outside its file, or
            ends over `END_TOLERANCE` after it; it names the row's id. The sound of a video may end before its picture.
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

    Pictures are the frames as they stand. Of a video the frames are shown at start, start + 1, ... up to `end` or the
    video's own; a last second of less than half is none. Where the picture ends before the sound, so do the frames; a
    clip after that end has the last one.

    Args:
        row: of a corpus.
        seconds: indices of the frames to open, in the order wanted; all by default.
        most: without `seconds`, open the first so many frames, or all that there are.
        shorter_side: pixels, to which larger frames are shrunk.

    Raises:
        MediaError: on a row without frames, files that cannot be read, a clip that starts after its video, or a second
            that the clip does not have; it names the row's id.
    """
    with _naming(row):
        count, start = _frames(row)
        if seconds is None:
            seconds = range(_known(count, row) if most is None else int(min(count, most)))
        for second in seconds:
            if not 0 <= second < count:
                raise MediaError(f"has no second {second}: it has {count}, from 0")
        if start is None:
            return [load_image(read_member(row["frames"][second]), shorter_side) for second in seconds]
        return load_frames(row["frames"][0], [start + second for second in seconds], shorter_side)


def count_frames(row: Mapping[str, Any]) -> int:
    """
    How many frames `open_frames` gives, without decoding any.

    Raises:
        MediaError: on a row without frames, a video that cannot be read or does not tell how long it is, or a clip
            that starts after its video; it names the row's id.
    """
    with _naming(row):
        return _known(_frames(row)[0], row)


def open_middle_frame(row: Mapping[str, Any]) -> Image.Image:
    """The middle frame of a clip, RGB (the sixth of ten, as the reference evaluates); MediaError as `open_frames`."""
    return open_frames(row, [count_frames(row) // 2])[0]


def _frames(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """How many frames a row has, infinity where that is unknown; and of a video, the time of the first."""
    frames = row["frames"]
    if not frames:
        raise MediaError("the row has no frames; add a video or pictures")
    if len(frames) > 1:
        return len(frames), None
    source = read_member(frames[0])
    info = probe(source)
    if info.kind == "image":
        return 1, None
    start, end = (0.0, None) if source["bytes"] is not None else (row["start"] or 0.0, row["end"])
    if info.duration is not None and start >= info.duration:
        raise MediaError(f"{source['path']}: the clip starts at {start:g} s, the video ends at {info.duration:.2f} s")
    known = [time for time in (end, info.duration) if time is not None]
    count = math.floor(min(known) - start + 0.5) if known else math.inf
    if info.picture_duration is not None:
        count = min(count, math.ceil(info.picture_duration - start - TIME_ROUNDING))
    return max(1, count), start


def _lasts(source: Mapping[str, Any], end: float) -> bool:
    """Whether a file goes on to `end`, with its picture alone."""
    info = probe(source)
    return info.has_video and info.duration is not None and info.duration >= end - END_TOLERANCE


def _known(count: float, row: Mapping[str, Any]) -> int:
    if count == math.inf:
        path = row["frames"][0]["path"]
        raise MediaError(f"{path}: declares no duration; give the clip an end, or name the seconds")
    return int(count)


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Errors within say whose they are."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"clip {row['id']!r}: {error}") from error
