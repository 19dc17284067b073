"""Open media sources (paths, bytes, file objects, rows of `datasets` columns) as seekable files; detect their type."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import soundfile
from PIL import Image, UnidentifiedImageError, features

from .names import find_file


MediaSource = str | os.PathLike | bytes | BinaryIO | Mapping

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
if features.check("avif"):
    IMAGE_FORMATS += ("AVIF",)
try:  # optional: reads HEIC, the picture format of many phones
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()
    IMAGE_FORMATS += ("HEIF",)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")
UNKNOWN_FRAMES = 2**62  # libsndfile reports about 2**63 frames if the header of a FLAC file has no length


class MediaError(ValueError):
    """Raised if a media file cannot be read as requested. The message names the file, the problem and the remedy."""


def source_name(source: MediaSource) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, Mapping):
        return source.get("path") or "<bytes>"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return "<bytes>" if isinstance(source, bytes) else str(getattr(source, "name", "<file>"))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_source(source: MediaSource) -> Iterator[tuple[str, BinaryIO]]:
    """Open a source. Yields its name and a seekable handle at its beginning."""
    name = source_name(source)
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if hasattr(source, "read"):
        source = source.read()
    handle = io.BytesIO(source) if isinstance(source, bytes) else _open_file(name, source)
    with handle:
        if not handle.read(1):
            raise MediaError(f"{name}: is empty; download or export it again")
        handle.seek(0)
        yield name, handle


def _open_file(name: str, source: str | os.PathLike) -> BinaryIO:
    try:
        path = find_file(source)
        if path.is_dir():
            raise MediaError(f"{name}: is a directory; give a media file")
        if path.exists() and not path.is_file():
            raise MediaError(f"{name}: is a pipe or a device; write it to a file first")
        raw = io.FileIO(path)
    except FileNotFoundError as error:
        raise MediaError(f"{name}: no such file; check the path") from error
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error
    except MediaError:
        raise
    except ValueError as error:  # a null byte, or a character that the file system cannot encode
        raise MediaError(f"{name!r}: is not a file name ({one_line(error)}); check the path") from error
    raw.name = "media"  # without an extension, since FFmpeg considers it along with the content
    return io.BufferedReader(raw)


def sniff(name: str, handle: BinaryIO) -> str:
    """
    Detect the type of a file: "image" (read by Pillow), "audio" (soundfile) or "container" (PyAV).

    soundfile reads seekable plain audio with a known length. FFmpeg reads all other sound.

    Raises:
        MediaError: if the file is a HEIC or AVIF picture that the installed packages do not support.
    """
    try:
        with Image.open(handle, formats=IMAGE_FORMATS):
            return "image"
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    finally:
        handle.seek(0)
    head = handle.read(12)
    handle.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        raise MediaError(
            f"{name}: is a HEIC or AVIF picture, which needs pillow-heif; pip install pillow-heif, or save it as JPEG"
        )
    # FFmpeg reads MP3, since the decoder of libsndfile prints every unusual tag to stderr
    is_plain = head[:4] in (b"fLaC", b"OggS") or (head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE")
    is_plain = is_plain or (head[:4] == b"FORM" and head[8:11] == b"AIF")
    if is_plain:
        try:
            with soundfile.SoundFile(handle) as sound:
                # libsndfile finds no frames in an Ogg file without its last page, but FFmpeg does
                if 0 < sound.frames < UNKNOWN_FRAMES and sound.seekable():
                    return "audio"
        except soundfile.SoundFileError:  # Theora in Ogg, or a rare codec in WAV, which FFmpeg may support
            pass
        finally:
            handle.seek(0)
    return "container"
