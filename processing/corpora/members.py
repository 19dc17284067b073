"""Files within uncompressed tar archives, under paths of their own: ARCHIVE#NAME@OFFSET+SIZE."""

import re
import tarfile
from collections.abc import Mapping
from typing import Any

from dali_llava.processing.media import MediaError


_PATH = re.compile(r"(?P<archive>.+)#(?P<name>[^#]+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


def member_path(archive: str, member: tarfile.TarInfo) -> str:
    """The path that `read_member` reads without looking for the member in the archive."""
    return f"{archive}#{member.name}@{member.offset_data}+{member.size}"


def file_of(path: str) -> str:
    """The file on disk that a row's path leads to: an archive for its member, itself for anything else."""
    match = _PATH.fullmatch(path)
    return path if match is None else match["archive"]


def read_member(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    {path, bytes} of a row with the bytes of a tar's member; of anything else, as it is.

    Raises:
        MediaError: the archive cannot be read, or not as far as the member goes; or there is neither path nor bytes.
    """
    if source["bytes"] is None and source["path"] is None:
        raise MediaError("the row names neither a file nor bytes; add the file, or leave the row out")
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
        raise MediaError(f"{match['archive']}: is damaged, it ends within {match['name']}; copy it again")
    return {"path": match["name"], "bytes": content}
