"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike, tag: str = "") -> Iterator[Path]:
    """
    A temporary path beside `path`. The file written there replaces `path` when the block ends without an error.

    Args:
        path: file to write; its folder exists.
        tag: part of the temporary name. Concurrent writers of one file need different tags. Without a tag the
            temporary name is fixed, so that a new run overwrites what a killed run has left.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
    [('a.txt', 'whole')]
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{tag}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only file system
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
