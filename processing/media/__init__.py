"""Load waveforms and images from media files."""

from .frames import frame_times
from .load import MediaInfo, load_audio, load_clip_frames, load_frames, load_image, probe
from .names import find_file, media_files
from .source import MediaError, MediaSource
from .windows import Window, load_windows


__all__ = [
    "MediaError",
    "MediaInfo",
    "MediaSource",
    "Window",
    "find_file",
    "frame_times",
    "load_audio",
    "load_clip_frames",
    "load_frames",
    "load_image",
    "load_windows",
    "media_files",
    "probe",
]
