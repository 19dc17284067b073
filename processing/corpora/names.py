"""Matching the names of clips with the names of files."""

import os
import posixpath
import unicodedata


KINDS = {
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff"), "sound"),
    **dict.fromkeys((".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".heic", ".heif", ".avif"), "image"),
}


def media_kind(name: str) -> str | None:
    """The kind of a file ("sound", "video" or "image") by its suffix, ignoring case; None for other suffixes."""
    return KINDS.get(posixpath.splitext(name.rstrip())[1].lower())


def name_key(name: str) -> str:
    """
    The key that matches the name of a clip with the name of its file.

    The key has forward slashes and composed characters (NFC, because macOS decomposes them in file names). It has no
    media suffix and no leading or trailing blanks.

    >>> name_key("./street/ tram.WAV")
    'street/ tram'
    >>> name_key("cafe\u0301.wav") == name_key("caf\u00e9")
    True
    """
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    stem = posixpath.splitext(name)[0] if media_kind(name) else name
    return posixpath.normpath(stem).strip() if stem else stem


def is_utf8(name: str) -> bool:
    """Whether a file name or text can be encoded as UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def printable(name: str) -> str:
    r"""
    The name for messages and reports, with characters that UTF-8 cannot encode escaped.

    >>> printable("caf\udce9.wav")
    'caf\\xe9.wav'
    """
    return os.fsencode(name).decode(errors="backslashreplace") if _is_file_name(name) else _escape(name)


def _is_file_name(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" and not "\udc80" <= character <= "\udcff" for character in name)


def _escape(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
