"""One run at a time on one output folder, or one of each job of an array."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .writer import write_error


@contextmanager
def output_lock(folder: Path, job_id: int, num_jobs: int) -> Iterator[None]:
    """
    Hold `folder` for job `job_id` of `num_jobs`; jobs of one array may hold it together, others may not.

    The lock is the system's (flock) and ends with the process, however that ends; its file stays.

    Raises:
        ValueError: another run is at work, named by the id of its process.
        OSError: the file system has no locks, or the folder cannot be written to.
    """
    own = folder / f".lock-{job_id}-of-{num_jobs}"
    try:
        handle = open(own, "a+", encoding="utf-8")
    except OSError as error:
        raise write_error(own, error) from error
    with handle:
        _take(handle, fcntl.LOCK_EX, folder)
        handle.truncate(0)
        print(os.getpid(), file=handle, flush=True)
        # Each looks at the others only when it holds its own: of two that start together, one at least sees the other.
        for path in folder.glob(".lock-*-of-*"):
            if not path.name.endswith(f"-of-{num_jobs}"):
                with open(path, encoding="utf-8") as other:
                    _take(other, fcntl.LOCK_SH, folder)
        yield


def _take(handle: TextIO, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        raise ValueError(
            f"{folder}: another run (process {handle.read().strip() or 'unknown'}) is at work on it; "
            "wait for its end, or give another --out"
        ) from error
    except OSError as error:
        raise OSError(
            f"{folder}: its file system has no locks ({error.strerror}); give --out a folder on another"
        ) from error
