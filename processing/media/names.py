"""File names as users write them: Unicode normal forms, folders of media, names that are not UTF-8."""

import codecs
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path


def find_file(name: str | os.PathLike) -> Path:
    """
    The file called `name`, or the one that is there under another Unicode normal form of the same name.

    macOS and some archives write "é" as two characters (NFD), keyboards write one (NFC). An exact match wins. The name
    comes back as given where nothing matches.
    """
    path = Path(name)
    if path.exists() or str(path).isascii():
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        exact = found / part
        if exact.exists():
            found = exact
            continue
        try:
            siblings = sorted(os.listdir(found))
        except OSError:
            return path
        wanted = unicodedata.normalize("NFC", part)
        match = next((name for name in siblings if unicodedata.normalize("NFC", name) == wanted), None)
        if match is None:
            return path
        found = found / match
    return found


def media_files(folder: str | os.PathLike, suffixes: Collection[str]) -> list[str]:
    """
    The media files of a folder, at any depth and sorted.

    Args:
        suffixes: of media files, in lower case: `a.WAV` counts for ".wav". Hidden files and folders are left out.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
        ]
    return sorted(files)


def write_names_as_they_are(error: UnicodeError) -> tuple[str | bytes, int]:
    """
    The error handler "file-names" of text streams: the bytes of a name that is not UTF-8 are written as they are (as
    "surrogateescape" does), and characters that the stream's encoding lacks as backslash escapes.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    try:
        return characters.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return characters.encode("ascii", "backslashreplace"), error.end


codecs.register_error("file-names", write_names_as_they_are)
