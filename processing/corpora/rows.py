"""The media of corpus rows: a clip's sound and its frames, in bytes or out of files (columns: see `load_corpus`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from dali_llava.processing.media import MediaError, load_audio, load_frames, load_image, probe


END_TOLERANCE = 1.0  # seconds by which a sound may stop before its clip's end: published ends are rounded


def open_audio(row: Mapping[str, Any], sampling_rate: int = 16000) -> np.ndarray:
    """
    The sound of a clip, (samples,) float32 mono at `sampling_rate` Hz.

    A file is cut to [start, end); bytes hold the clip alone.

    Raises:
        MediaError: on a row without sound, a file that `load_audio` rejects, or a clip that lies outside its file, or
            ends over `END_TOLERANCE` after it; it names the row's id.
    """
    audio = row["audio"]
    with _naming(row):
        if audio is None:
            raise MediaError("the row has no sound; load the corpus with missing='skip', or add the file")
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
        if end is not None and reached < end - END_TOLERANCE:
            raise MediaError(
                f"{audio['path']}: the clip ends at {end:g} s, its sound at {reached:.2f} s; correct `end`"
            )
        return waveform


def open_frames(row: Mapping[str, Any], seconds: Sequence[int] | None = None) -> list[Image.Image]:
    """
    The first frame of each second of a clip, as RGB images.

    Pictures are the frames as they stand. Of a video the frames are shown at start, start + 1, ... up to `end` or the
    video's own; a last second of less than half is none.

    Args:
        row: of a corpus.
        seconds: indices of the frames to open, in the order wanted; all by default.

    Raises:
        MediaError: on a row without frames, files that cannot be read, a clip that starts after its video, or a second
            that the clip does not have; it names the row's id.
    """
    frames = row["frames"]
    with _naming(row):
        if not frames:
            raise MediaError("the row has no frames; add a video or pictures")
        if len(frames) > 1 or probe(frames[0]).kind == "image":
            return [load_image(frames[second]) for second in _chosen(seconds, len(frames))]
        start, end = (0.0, None) if frames[0]["bytes"] is not None else (row["start"] or 0.0, row["end"])
        length = probe(frames[0]).duration
        if length is not None and start >= length:
            raise MediaError(f"{frames[0]['path']}: the clip starts at {start:g} s, the video ends at {length:.2f} s")
        known = [time for time in (end, length) if time is not None]
        if not known and seconds is None:
            raise MediaError(f"{frames[0]['path']}: declares no duration; give the clip an end, or name the seconds")
        count = max(1, math.floor(min(known) - start + 0.5)) if known else math.inf
        return load_frames(frames[0], [start + second for second in _chosen(seconds, count)])


def _chosen(seconds: Sequence[int] | None, count: float) -> Sequence[int]:
    """The indices asked for, all of `count` by default."""
    if seconds is None:
        return range(int(count))
    for second in seconds:
        if not 0 <= second < count:
            raise MediaError(f"has no second {second}: it has {count}, from 0")
    return seconds


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Errors within say whose they are."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"clip {row['id']!r}: {error}") from error
