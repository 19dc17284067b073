"""Names of clips and files, as both sides of a match spell them."""

import os
import posixpath
import unicodedata


KINDS = {
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), "sound"),
    **dict.fromkeys((".mp4", ".mkv", ".webm", ".mov", ".avi"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png"), "image"),
}


def media_kind(name: str) -> str | None:
    """ "sound", "video" or "image" by the suffix of a file, in any case; None for another suffix."""
    return KINDS.get(posixpath.splitext(name.rstrip())[1].lower())


def name_key(name: str) -> str:
    """
    The key under which the name of a clip and the name of its file match.

    It has no media suffix and no blanks at its ends, forward slashes, and composed characters (NFC), as macOS
    decomposes them.

    >>> name_key("./street/ tram.WAV")
    'street/ tram'
    >>> name_key("cafe\u0301.wav") == name_key("caf\u00e9")
    True
    """
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    stem = posixpath.splitext(name)[0] if media_kind(name) else name
    return posixpath.normpath(stem).strip() if stem else stem


def is_utf8(name: str) -> bool:
    """Whether a name, of a file or in a text, can be written as UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def printable(name: str) -> str:
    r"""
    The name with what UTF-8 cannot express escaped, for messages and reports.

    >>> printable("caf\udce9.wav")
    'caf\\xe9.wav'
    """
    return os.fsencode(name).decode(errors="backslashreplace") if _is_file_name(name) else _escape(name)


def _is_file_name(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" and not "\udc80" <= character <= "\udcff" for character in name)


def _escape(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
