"""From files to waveforms and pictures."""

from .containers import MediaError
from .files import MediaInfo, MediaSource, load_audio, load_frames, load_image, probe


__all__ = ["MediaError", "MediaInfo", "MediaSource", "load_audio", "load_frames", "load_image", "probe"]
