"""Lock an output folder for one run, or for the jobs of one array."""

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
    Lock `folder` for job `job_id` of `num_jobs`. Only jobs of the same array can hold the lock at the same time.

    The operating system holds the lock (flock) and releases it when the process ends in any way. The lock file stays.

    Raises:
        ValueError: if another run holds the lock. The message names its process id.
        OSError: if the file system does not support locks, or the folder is not writable.
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
        # Each run takes its own lock before it checks the others: if two start together, at least one sees the other.
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
            f"{folder}: another run (process {handle.read().strip() or 'unknown'}) is writing to it; "
            "wait until it ends, or give another --out"
        ) from error
    except OSError as error:
        raise OSError(
            f"{folder}: its file system does not support locks ({error.strerror}); give --out a folder on another one"
        ) from error
