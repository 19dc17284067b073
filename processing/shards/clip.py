"""Prepare one clip of a corpus: convert its row to the files of a shard, or return the reason for leaving it out."""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from ..corpora.members import file_of
from ..corpora.rows import open_audio, open_frames
from ..media import MediaError, probe


SAMPLING_RATE = 16000
REQUIREMENTS = ("audio", "frames")
# Reason -> description.
REASONS = {
    "missing": "a file does not exist",
    "broken": "a file cannot be read, or not to the end of the clip",
    "no_sound": "the file has no sound track, or an empty one",
    "no_picture": "no picture is listed, or the file has none",
    "too_short": "the sound is shorter than --min-seconds",
    "silent": "the sound's peak is below --silence",
    "frozen": "all of several frames are alike",
    "duplicate": "an earlier clip has the same id",
    "crashed": "the process that decoded it died twice",
}
FROZEN_SIZE = 32  # side in pixels of the grey pictures that frames are compared as
FROZEN_LEVELS = 3  # frames are alike if no pixel differs by more than this, of 255
KEY_LENGTH = 60
METADATA = ("id", "captions", "labels", "start", "end", "source")


@dataclass(frozen=True)
class ClipSettings:
    """
    Settings for preparing clips.

    Args:
        frames: maximum number of pictures per clip; the first frame of each second is taken.
        frame_size: maximum shorter side of a picture in pixels. Pictures are never enlarged.
        quality: quality of the JPEG files, 1 to 95.
        min_seconds: minimum length of the sound.
        silence: peak below which a sound is silent; full scale is 1.
        keep_silent: whether to keep silent clips.
        keep_frozen: whether to keep clips in which all frames are alike.
        require: what a clip must have, any of "audio" and "frames". Every clip must have at least one of the two.

    Raises:
        ValueError: if a value is outside its range.
    """

    frames: int = 10
    frame_size: int = 336
    quality: int = 90
    min_seconds: float = 1.0
    silence: float = 0.001
    keep_silent: bool = False
    keep_frozen: bool = False
    require: tuple[str, ...] = REQUIREMENTS

    def __post_init__(self):
        ranges = {"frames": (1, 1000), "frame_size": (8, 8192), "quality": (1, 95), "silence": (0, 1)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {getattr(self, name)!r}")
        if self.min_seconds < 0.1:
            raise ValueError(f"min_seconds must be at least 0.1, not {self.min_seconds!r}")
        for name in self.require:
            if name not in REQUIREMENTS:
                raise ValueError(f"require: unknown {name!r}; choose from {', '.join(REQUIREMENTS)}")


@dataclass(frozen=True)
class PreparedClip:
    """
    A prepared clip.

    Attributes:
        key: key of the clip in a shard.
        files: contents of its files by extension (flac, 0.jpg ... 9.jpg, json).
        seconds: length of its sound; 0 if it has none.
    """

    key: str
    files: dict[str, bytes]
    seconds: float


@dataclass(frozen=True)
class Dropped:
    """A clip that is left out, with a reason of `REASONS` and one line of detail."""

    id: str
    reason: str
    detail: str


class _Drop(Exception):
    """Raised to leave out a clip. Its arguments are the reason and the detail."""


def prepare_clip(row: Mapping, settings: ClipSettings) -> PreparedClip | Dropped:
    """
    Decode, cut and encode one clip: 16-bit mono FLAC at 16 kHz, and a JPEG for the first frame of each second.

    Args:
        row: row of a corpus; see `dali_llava.processing.corpora`.
        settings: how to cut the clip and what it must have.

    Returns:
        The clip, or the reason why it is left out. Damaged files never raise an error.
    """
    try:
        if not is_given(row["audio"]) and not row["frames"]:
            raise _Drop("missing", "no media file was found")
        waveform = _sound(row, settings)
        pictures = _pictures(row, settings)
        if waveform is None and not pictures:
            raise _Drop("no_sound", "it has no picture either")
        files = {} if waveform is None else {"flac": _flac(waveform)}
        files |= {f"{number}.jpg": _jpeg(picture, settings.quality) for number, picture in enumerate(pictures)}
    except _Drop as drop:
        return Dropped(row["id"], *drop.args)
    except Exception as error:  # decoders may raise anything on damaged files, and the run must continue
        return Dropped(row["id"], "broken", f"{type(error).__name__}: {' '.join(str(error).split())}")
    files["json"] = json.dumps({name: row[name] for name in METADATA}).encode()
    return PreparedClip(clip_key(row["id"]), files, 0.0 if waveform is None else len(waveform) / SAMPLING_RATE)


def clip_key(name: str) -> str:
    """
    Convert an id to a WebDataset key, in which a dot would end the key and a slash would name a folder.

    An id of up to 60 letters, digits, hyphens and underscores is its own key. Any other id is cut, its other
    characters are replaced, and a "=" and a digest are appended. No plain id contains a "=", so keys are unique.

    >>> clip_key("-0049e_2")
    '-0049e_2'
    >>> clip_key("rain/a.wav")
    'rain_a_wav=8574cbf450a1'
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:KEY_LENGTH]
    if safe == name and name:
        return name
    return f"{safe}={hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"


def _sound(row: Mapping, settings: ClipSettings) -> np.ndarray | None:
    """Load the waveform `(samples,)` of a clip; None if it has no sound and sound is not required."""
    source = row["audio"]
    if not is_given(source):
        return _absent("missing", "no file with sound was found", "audio", settings)
    _check_there(source)
    try:
        waveform = open_audio(row, SAMPLING_RATE)
    except MediaError as error:
        reason = _why_no_sound(source, row["start"] or 0.0, settings.min_seconds, error)
        if reason == "no_sound":
            return _absent(reason, _told(row, error), "audio", settings)
        raise _Drop(reason, _told(row, error)) from error
    seconds = len(waveform) / SAMPLING_RATE
    if seconds < settings.min_seconds:
        raise _Drop("too_short", f"{seconds:.3f} s of sound, less than {settings.min_seconds:g} s")
    peak = float(np.abs(waveform).max())
    if peak < settings.silence and not settings.keep_silent:
        raise _Drop("silent", f"its peak of {peak:.6f} is below {settings.silence:g}")
    return waveform


def _why_no_sound(source: Mapping, start: float, min_seconds: float, error: MediaError) -> str:
    """Return the reason for an error in decoding the sound."""
    try:
        info = probe(source)
    except MediaError:
        return "broken"
    if not info.has_audio or "contains no sound (zero length)" in str(error):
        return "no_sound"
    if "outside the sound" in str(error) and info.has_video and start < (info.duration or 0.0):
        return "no_sound"  # the sound has ended, but the picture continues
    return "too_short" if info.duration is not None and info.duration - start < min_seconds else "broken"


def _pictures(row: Mapping, settings: ClipSettings) -> list[Image.Image]:
    """Load the resized frames of a clip; an empty list if it has none and frames are not required."""
    sources = row["frames"] or []
    if not sources:
        return _absent("no_picture", "no picture is listed", "frames", settings) or []
    for source in sources:
        _check_there(source)
    try:
        pictures = open_frames(row, most=settings.frames, shorter_side=settings.frame_size)
    except MediaError as error:
        reason = _why_no_picture(sources[0])
        if reason == "no_picture":
            return _absent(reason, _told(row, error), "frames", settings) or []
        raise _Drop(reason, _told(row, error)) from error
    if len(pictures) > 1 and not settings.keep_frozen and _are_alike(pictures):
        raise _Drop("frozen", f"{len(pictures)} frames that differ by {FROZEN_LEVELS} of 255 at most")
    return pictures


def _why_no_picture(source: Mapping) -> str:
    try:
        return "no_picture" if probe(source).kind == "audio" else "broken"
    except MediaError:
        return "broken"


def _absent(reason: str, detail: str, what: str, settings: ClipSettings) -> None:
    if what in settings.require:
        raise _Drop(reason, detail)


def is_given(source: Mapping | None) -> bool:
    """Whether a `{path, bytes}` entry of a row names a file or holds its bytes."""
    return source is not None and (source["bytes"] is not None or source["path"] is not None)


def _check_there(source: Mapping) -> None:
    if source["bytes"] is None and not Path(file := file_of(source["path"])).exists():
        raise _Drop("missing", f"{file}: no such file")


def _told(row: Mapping, error: MediaError) -> str:
    """Return the error without the name of the clip, which has its own column in the report."""
    return str(error).removeprefix(f"clip {row['id']!r}: ")


def _are_alike(pictures: list[Image.Image]) -> bool:
    small = [picture.convert("L").resize((FROZEN_SIZE,) * 2, Image.Resampling.BOX) for picture in pictures]
    grey = np.stack([np.asarray(picture, np.int16) for picture in small])  # (frames, FROZEN_SIZE, FROZEN_SIZE)
    return int(np.ptp(grey, axis=0).max()) <= FROZEN_LEVELS


def _flac(waveform: np.ndarray) -> bytes:
    # rounded, so that 16-bit samples stay exactly the same
    samples = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
