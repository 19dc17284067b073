"""Find files by the names that users write: Unicode normal forms, folders of media, names that are not UTF-8."""

import codecs
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path


def find_file(name: str | os.PathLike) -> Path:
    """
    Return the path of the file called `name`, also if its name is stored in another Unicode normal form.

    macOS and some archives write "é" as two characters (NFD), keyboards as one (NFC). An exact match takes precedence.
    If nothing matches, the name is returned unchanged.
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
    Return the sorted paths of the media files of a folder, at any depth. Hidden files and folders are skipped.

    Args:
        folder: folder to search.
        suffixes: suffixes of media files, in lower case. The case of file names does not matter: ".wav" matches
            `a.WAV`.
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
    Encoding error handler "file-names" for text streams.

    It writes the bytes of a name that is not UTF-8 unchanged, as "surrogateescape" does, and characters that the
    encoding of the stream does not support as backslash escapes.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    try:
        return characters.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return characters.encode("ascii", "backslashreplace"), error.end


codecs.register_error("file-names", write_names_as_they_are)
