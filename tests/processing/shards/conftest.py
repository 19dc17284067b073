"""Synthetic media with samples and frames that identify their position, rows that name them, and runs to compare."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.corpora.builder import FEATURES
from dali_llava.processing.shards import prepare_shards


RATE = 16_000
FRAME_RATE = 5


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise below 4 kHz, `(samples,)` float32 at 16 kHz, which is not correlated with shifted copies of itself."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(round(seconds * RATE)))
    spectrum[len(spectrum) // 2 :] = 0
    wave = np.fft.irfft(spectrum, round(seconds * RATE))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def grey_of(second: int) -> int:
    """Return the grey level of the frames of a synthetic video in that second."""
    return 20 + 16 * second


def write_clip(
    path: Path,
    container: str,
    video: str | None,
    audio: str | None,
    seconds: float = 11.0,
    still: bool = False,
    sound: np.ndarray | None = None,
    size: tuple[int, int] = (64, 48),
) -> Path:
    """Encode `noise` at 16 kHz (48 kHz for Opus), and frames with the grey level of their second."""
    with av.open(str(path), "w", format=container) as output:
        if video:
            pictures = output.add_stream(video, rate=FRAME_RATE)
            pictures.width, pictures.height, pictures.pix_fmt, pictures.gop_size = *size, "yuv420p", 7
        if audio:
            track = output.add_stream(audio, rate=RATE, layout="mono")
        if video:
            for index in range(round(seconds * FRAME_RATE)):
                grey = grey_of(0 if still else index // FRAME_RATE)
                frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, FRAME_RATE)
                output.mux(pictures.encode(frame))
            output.mux(pictures.encode(None))
        if audio:
            samples = noise(seconds) if sound is None else sound
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path


def make_row(name: str, audio: Path | None = None, frames: tuple[Path, ...] = (), **fields) -> dict:
    """Make a row of a corpus. An mp4 file can be both `audio` and a frame."""
    row = {"id": name, "captions": [f"the sound of {name}"], "labels": ["noise"], "source": "made"}
    row |= {"start": 0.0, "end": None}
    row["audio"] = None if audio is None else {"path": str(audio), "bytes": None}
    row["frames"] = [{"path": str(path), "bytes": None} for path in frames]
    return row | fields


def as_corpus(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files of a folder by name, without the locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock-")
    }


@pytest.fixture(scope="session")
def made() -> dict[str, Callable]:
    """The functions of this file. Test folders are not packages, so they cannot be imported."""
    functions = (noise, grey_of, write_clip, make_row, as_corpus, contents)
    return {function.__name__: function for function in functions}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> datasets.Dataset:
    """Twenty good clips of 1.2 s, each a FLAC file and two pictures, in twelve files."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for number in range(20):
        path = folder / f"{number}.flac"
        soundfile.write(path, noise(1.2, seed=number), RATE)
        pictures = []
        for second in range(2):
            pictures.append(folder / f"{number}-{second}.png")
            colours = np.random.default_rng([number, second]).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((64, 48)).save(pictures[-1])
        rows.append(make_row(f"clip-{number:03d}", path, tuple(pictures), end=1.2))
    return as_corpus(rows)


@pytest.fixture(scope="session")
def unbroken(corpus, tmp_path_factory) -> Path:
    """The shards of `corpus`, three clips each, of an uninterrupted run in one process. Tests must not change it."""
    folder = tmp_path_factory.mktemp("unbroken")
    prepare_shards(corpus, folder, clips_per_shard=3, num_proc=1)
    return folder
