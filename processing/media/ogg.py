"""Chained Ogg files: several complete streams in a row, of which libsndfile reads only the first."""

import io
from collections.abc import Iterator
from typing import BinaryIO

import soundfile


def open_sounds(handle: BinaryIO) -> Iterator[soundfile.SoundFile]:
    """Open the sounds of a plain audio file in turn: one sound, or several in a chained Ogg file."""
    handle.seek(0)
    if handle.read(4) != b"OggS":
        handle.seek(0)
        with soundfile.SoundFile(handle) as sound:
            yield sound
        return
    begins = _begins(handle)
    for begin, end in zip(begins, [*begins[1:], None], strict=True):
        handle.seek(begin)
        link = handle if len(begins) == 1 else io.BytesIO(handle.read(-1 if end is None else end - begin))
        with soundfile.SoundFile(link) as sound:
            yield sound


def _begins(handle: BinaryIO) -> list[int]:
    """Return the byte offsets at which the streams of a chain start."""
    begins, in_head, position = [0], True, 0
    while True:
        handle.seek(position)
        header = handle.read(27)
        if len(header) < 27 or header[:4] != b"OggS":
            return begins
        is_first = bool(header[5] & 2)  # the flag of a stream's first page
        if is_first and not in_head:
            begins.append(position)
        in_head = is_first
        sizes = handle.read(header[26])
        position += 27 + len(sizes) + sum(sizes)
