"""Read sound as a stream of mono chunks, with one decoder per file, forward only, to the true end of the sound."""

import math
from collections.abc import Generator, Iterator
from itertools import groupby, islice
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr
from av.container import InputContainer as Container

from .containers import (
    CUT_TOLERANCE,
    audio_stream,
    cut_error,
    declared_end,
    decode,
    is_indexed,
    is_truncated,
    open_container,
    origin_of,
    seek,
)
from .ogg import open_sounds
from .source import MediaError, one_line


# Mono samples (samples,) float32 and their rate in Hz.
Chunk = tuple[np.ndarray, int]

SEEK_GAP = 10.0  # seconds; shorter distances to an excerpt are decoded without a seek
FRAMES_MIXED = 64  # decoded frames that are mixed at once
BLOCK_SECONDS = 10  # seconds of sound that soundfile reads at once


def read_sound(name: str, handle: BinaryIO, kind: str, start: int = 0, end: float = math.inf) -> Iterator[Chunk]:
    """
    Read mono chunks from `start` to `end` (seconds) or to the end of the sound, each at the rate of its part of the
    file.

    Args:
        kind: result of `sniff`.
        start: whole seconds, since a whole second is a whole number of samples at every rate.

    Raises:
        MediaError: if the file is an image or a video without sound, is damaged, or is cut off before `end`.
    """
    if kind == "image":
        raise MediaError(f"{name}: is a still image, without sound; use it as an image, or pass audio or video")
    if kind == "audio":
        return _read_soundfile(name, handle, start, end)
    return _read_container(name, handle, start, end)


def resample(chunks: Iterator[Chunk], sampling_rate: int) -> Iterator[np.ndarray]:
    """Resample chunks to one sampling rate. If the rate changes midway, each part is resampled separately."""
    for rate, part in groupby(chunks, key=lambda chunk: chunk[1]):
        if rate == sampling_rate:
            yield from (samples for samples, _ in part)
            continue
        stream = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
        for samples, _ in part:
            yield stream.resample_chunk(np.ascontiguousarray(samples))
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _read_soundfile(name: str, handle: BinaryIO, start: int, end: float) -> Iterator[Chunk]:
    offset = 0.0  # start of a sound within a chain, in seconds
    try:
        for sound in open_sounds(handle):
            rate, length = sound.samplerate, sound.frames
            position = max(0, min(round((start - offset) * rate), length))
            last = math.ceil(min((end - offset) * rate, length))
            sound.seek(position)
            while position < last:
                wanted = min(last - position, BLOCK_SECONDS * rate)
                samples = sound.read(wanted, dtype="float32", always_2d=True)
                position += len(samples)
                if len(samples):
                    yield samples.mean(axis=1), rate
                if len(samples) < wanted:
                    break
            if last - position > CUT_TOLERANCE * rate:
                raise cut_error(name, offset + position / rate, offset + length / rate)
            offset += length / rate
            if offset >= end:
                break
    except soundfile.SoundFileError as error:
        raise MediaError(f"{name}: is damaged ({one_line(error)}); download or export it again") from error


def _read_container(name: str, handle: BinaryIO, start: int, end: float) -> Iterator[Chunk]:
    with open_container(name, handle) as container:
        stream = audio_stream(container)
        if stream is None:
            raise MediaError(f"{name}: is a video without sound; use its picture only, or pass a file with sound")
        declared = declared_end(container, stream)
        end = end if declared is None else min(end, declared)
        if end <= start:
            return
        if start > SEEK_GAP and is_indexed(container):
            seek(container, stream, start - 1.0)  # before the excerpt, so that the decoder reaches a steady state
        reached = yield from _excerpt(_timed_chunks(container, stream), start, end)
        if declared is not None and end - reached > max(CUT_TOLERANCE, 0.02 * declared):
            raise cut_error(name, reached, declared)
        # A track without a declared length may end early. It is cut off only if bytes of the file are missing.
        if declared is None and reached < end and is_indexed(container) and is_truncated(handle):
            raise cut_error(name, reached, container.duration and container.duration / av.time_base)


def _timed_chunks(container: Container, stream: av.AudioStream) -> Iterator[tuple[float, np.ndarray, int]]:
    """
    Yield the time of the first sample, the mono samples and the rate of each chunk.

    Times are counted from the time stamp of the first frame.
    """
    time = None
    for frames in _alike(decode(container, stream)):
        rate = frames[0].sample_rate
        if time is None:
            time = 0.0 if frames[0].time is None else frames[0].time - origin_of(container)
        yield time, _mix(frames), rate
        time += sum(frame.samples for frame in frames) / rate


def _excerpt(chunks: Iterator[tuple[float, np.ndarray, int]], start: int, end: float) -> Generator[Chunk, None, float]:
    """
    Yield the chunks from `start` to `end`, with silence first if the sound starts after `start`.

    Returns:
        The time in seconds at which reading stopped: `end` or later, or the end of the sound if that is earlier.
    """
    position, previous, reached = 0, None, 0.0
    for time, samples, rate in chunks:
        last = math.inf if end == math.inf else math.ceil((end - start) * rate)
        if rate != previous:
            position = round((time - start) * rate)
            if previous is None and position > 0:
                yield np.zeros(min(position, last), np.float32), rate
            previous = rate
        kept = samples[max(0, -position) : max(0, min(len(samples), last - position))]
        position += len(samples)
        reached = time + len(samples) / rate
        if len(kept):
            yield kept, rate
        if reached >= end:
            break
    return reached


def _alike(frames: Iterator[av.AudioFrame]) -> Iterator[list[av.AudioFrame]]:
    """Group successive frames with the same rate, format and number of channels, all of which may change midway."""
    for _, group in groupby(
        frames, key=lambda frame: (frame.sample_rate, frame.format.name, frame.layout.nb_channels)
    ):
        while alike := list(islice(group, FRAMES_MIXED)):
            yield alike


def _mix(frames: list[av.AudioFrame]) -> np.ndarray:
    """Average the channels to `(samples,)` float32. Integer samples are scaled to [-1, 1]."""
    samples = np.concatenate([_samples(frame) for frame in frames], axis=1)
    if np.issubdtype(samples.dtype, np.floating):
        return samples.mean(axis=0, dtype=np.float32)
    bits = 8 * samples.dtype.itemsize
    centre = 128 if samples.dtype == np.uint8 else 0
    return ((samples.mean(axis=0, dtype=np.float64) - centre) / 2 ** (bits - 1)).astype(np.float32)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Return the samples of a frame, `(channels, samples)`."""
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T
