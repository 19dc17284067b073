"""Files and folders that are written whole or not at all."""

import os
import tempfile
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


def check_new_folder(out: Path) -> None:
    """
    Check that `out` does not exist or is an empty folder.

    Raises:
        FileExistsError: if `out` is a file, or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: already exists; choose another folder, or remove it first")


@contextmanager
def new_folder(out: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """
    A temporary folder beside `out`. It becomes `out` when the block ends without an error.

    Args:
        out: folder to write. Its parents are made.
        replace: whether to replace `out` if it is not empty.

    Raises:
        FileExistsError: if `out` is not empty and `replace` is not set.
    """
    out = Path(out)
    if not replace:
        check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()  # default permissions, since the temporary folder is private
        yield folder
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        folder.rename(out)
