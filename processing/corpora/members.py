"""Files in uncompressed tar archives, addressed by paths of the form ARCHIVE#NAME@OFFSET+SIZE."""

import re
import tarfile
from collections.abc import Mapping
from typing import Any

from dali_llava.processing.media import MediaError


_PATH = re.compile(r"(?P<archive>.+)#(?P<name>[^#]+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


def member_path(archive: str, member: tarfile.TarInfo) -> str:
    """The path of a member, which `read_member` reads without searching the archive."""
    return f"{archive}#{member.name}@{member.offset_data}+{member.size}"


def file_of(path: str) -> str:
    """The file on disk for a row's path: the archive for a member, the path itself otherwise."""
    match = _PATH.fullmatch(path)
    return path if match is None else match["archive"]


def read_member(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Read a tar member into the `bytes` of a row's {path, bytes}. Any other source is returned unchanged.

    Raises:
        MediaError: the archive cannot be read, the archive ends within the member, or the source has neither path nor
            bytes.
    """
    if source["bytes"] is None and source["path"] is None:
        raise MediaError("the row has neither a path nor bytes; add the file, or remove the row")
    match = None if source["bytes"] is not None else _PATH.fullmatch(source["path"])
    if match is None:
        return source
    size = int(match["size"])
    try:
        with open(match["archive"], "rb") as file:
            file.seek(int(match["offset"]))
            content = file.read(size)
    except OSError as error:
        raise MediaError(f"{match['archive']}: cannot be read ({error.strerror or error})") from error
    if len(content) < size:
        raise MediaError(f"{match['archive']}: is damaged (it ends within {match['name']}); copy it again")
    return {"path": match["name"], "bytes": content}
