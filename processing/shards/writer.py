"""Write files atomically, and tar shards with bytes that only depend on their content."""

import errno
import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dali_llava.atomic import atomic_path

from .clip import PreparedClip


_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again to resume",
    errno.EDQUOT: "free some of your quota and run the same command again to resume",
    errno.EROFS: "give --out a folder on a writable file system",
    errno.EACCES: "give --out a folder that you may write to",
    errno.EPERM: "give --out a folder that you may write to",
}


def write_error(path: Path, error: OSError) -> OSError:
    """Return the error of writing `path`, in one line with the remedy."""
    remedy = _REMEDIES.get(error.errno, "give --out another folder, or check the disk")
    return OSError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


@contextmanager
def write_whole(path: Path, tag: str = "") -> Iterator[BinaryIO]:
    """
    Open a binary file that is written completely or not at all; see `atomic_path`.

    Raises:
        OSError: if the file cannot be written. The message is one line with the remedy.
    """
    try:
        with atomic_path(path, tag) as temporary, open(temporary, "wb") as file:
            yield file
    except OSError as error:
        if error.errno is None:
            raise
        raise write_error(path, error) from error


class TarShard:
    """
    A tar archive in the WebDataset layout: the files of a clip are consecutive and named KEY.EXTENSION.

    Headers contain no time and no owner, so the same clips give the same bytes. `size` and `digest()` describe the
    bytes written so far.
    """

    def __init__(self, file: BinaryIO):
        self.size = 0
        self.clips = 0
        self.seconds = 0.0
        self._file = file
        self._hash = hashlib.sha256()

    def add(self, clip: PreparedClip) -> None:
        """Append a clip."""
        for extension, content in clip.files.items():
            header = tarfile.TarInfo(f"{clip.key}.{extension}")
            header.size = len(content)
            self._write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        self.clips += 1
        self.seconds += clip.seconds

    def finish(self) -> None:
        """Append the end of the archive: two empty blocks, padded to a whole record."""
        end = self.size + 2 * tarfile.BLOCKSIZE
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))

    def digest(self) -> str:
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)


def tar_size(clip: PreparedClip) -> int:
    """Return the size of a clip in a shard, in bytes."""
    return sum(tarfile.BLOCKSIZE + len(content) + -len(content) % tarfile.BLOCKSIZE for content in clip.files.values())
