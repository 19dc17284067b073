"""Real sound in AVWorld: the recordings of ESC-10 in place of ten classes' synthesisers.

ESC-10 is `NNN - CATEGORY/FOLD-CLIPID-TAKE.ogg`; the takes of one source stay in one fold. Many of its clips are a
short sound within digital silence, so whatever is cut from one is chosen to hold sound.

Reference: K. J. Piczak. ESC: Dataset for Environmental Sound Classification. ACM Multimedia, 2015.
"""

import hashlib
import re
from collections.abc import Collection
from functools import cache, partial
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from dali_llava.processing.media import MediaError, load_audio

from .scenes import FADE, NUM_SAMPLES, PEAK, SAMPLING_RATE
from .signals import reverberate
from .synthesis import Synthesiser


# Class -> category of ESC-10.
CATEGORIES: dict[str, str] = {
    "dog": "Dog bark",
    "rain": "Rain",
    "waves": "Sea waves",
    "baby": "Baby cry",
    "clock": "Clock tick",
    "person": "Person sneeze",
    "helicopter": "Helicopter",
    "chainsaw": "Chainsaw",
    "rooster": "Rooster",
    "fire": "Fire crackling",
}
FOLDS = (1, 2, 3, 4)
TRAIN_FOLDS = (1, 2, 3)
TEST_FOLD = 4
SILENCE = 0.01  # of a recording's peak: what is fainter at its ends is cut off
LOUD_SHARE = 0.5  # a random crop's energy, of the loudest crop's of the recording
AUDIBLE_SHARE = 0.05  # the same of a crop to test on
LARGEST_SPEED = 1.2  # a varied recording is played at up to this speed, and down to its inverse
REVERBERANT = 0.3  # share of the varied recordings that a room is added to
REVERBERATION_TIME = (0.1, 0.5)  # seconds to -60 dB
REVERBERATION_LEVEL = (-12.0, 0.0)  # dB, reverberant over direct sound

_REMEDY = "give the folder of ESC-10, which holds '001 - Dog bark' ... '010 - Fire crackling'"
_FOLDER_NAME = re.compile(r"\d+\s*-\s*(.+)")
_FILE_NAME = re.compile(r"(\d+)-\d+-[A-Z]\.(?:ogg|wav)", re.IGNORECASE)


def _category_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders of each class; whatever else lies beside them is passed over."""
    classes = {category.casefold(): name for name, category in CATEGORIES.items()}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FOLDER_NAME.fullmatch(path.name)
        name = match and classes.get(match[1].strip().casefold())
        if name and path.is_dir():
            found.setdefault(name, []).append(path)
    return found


def _by_fold(folders: list[Path]) -> dict[int, list[Path]]:
    """The recordings of one class: fold -> files."""
    folds: dict[int, list[Path]] = {}
    wrong = []
    for path in sorted(path for folder in folders for path in folder.iterdir() if not path.name.startswith(".")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            wrong.append(str(path))
        else:
            folds.setdefault(int(match[1]), []).append(path)
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not named FOLD-CLIPID-TAKE.ogg or .wav; rename or remove")
    return folds


def find_recordings(folder: str | Path) -> dict[str, dict[int, list[Path]]]:
    """The recordings of ESC-10, found by their folders' names, whatever their numbers and case.

    Returns:
        class of AVWorld -> fold -> files, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: classes that are missing (all of them named) or lack recordings in a fold of 1 to 4, or a file
            that is not named `FOLD-CLIPID-TAKE.ogg` or `.wav`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {_REMEDY}")
    folders = _category_folders(folder)
    if missing := [f"{name} ('{category}')" for name, category in CATEGORIES.items() if name not in folders]:
        raise ValueError(f"{folder}: no recordings of {', '.join(missing)}; {_REMEDY}")
    found = {name: _by_fold(folders[name]) for name in CATEGORIES}
    if lacking := [f"{name} in fold {fold}" for name in found for fold in FOLDS if fold not in found[name]]:
        raise ValueError(f"{folder}: no recordings of {', '.join(lacking)}; {_REMEDY}")
    return found


def recordings_hash(folder: str | Path) -> str:
    """A digest of the recordings' names and sizes, wherever the folder lies.

    Raises:
        FileNotFoundError, ValueError: as `find_recordings` does.
    """
    digest = hashlib.sha256()
    for folds in find_recordings(folder).values():
        for path in (path for fold in sorted(folds) for path in folds[fold]):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


@cache
def sounding_part(path: Path, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """A recording without the silence at its ends, (samples,) float32, mono. Decoded once a process; read-only.

    Raises:
        MediaError: a file that cannot be decoded or holds nothing but silence.
    """
    samples = load_audio(path, sampling_rate)
    level = np.abs(samples)
    if not level.any():
        raise MediaError(f"{path}: holds nothing but silence; download it again or remove it")
    loud = np.flatnonzero(level >= SILENCE * level.max())
    sound = samples[loud[0] : loud[-1] + 1].copy()
    sound.flags.writeable = False
    return sound


def _crops(sound: np.ndarray, size: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """All crops of a sound, and their energies without `margin` samples at either end.

    The sound is padded at both ends with `margin` zeros, or as many as make it `size` long, so that every sample of it
    lies within the inner part of some crop.

    Returns:
        crops: (n, size), a view; crop 0 begins with the padding.
        energies: (n,) float64.
    """
    padded = np.pad(sound, max(size - sound.size, margin))
    sums = np.concatenate([[0.0], np.cumsum(np.square(padded, dtype=np.float64))])
    count = padded.size - size + 1
    energies = sums[size - margin :][:count] - sums[margin:][:count]
    return np.lib.stride_tricks.sliding_window_view(padded, size), energies


def _vary(sound: np.ndarray, rng: np.random.Generator, sampling_rate: int) -> np.ndarray:
    """The sound at another speed, and so another pitch, and sometimes in a room."""
    speed = LARGEST_SPEED ** rng.uniform(-1, 1)
    sound = resample_poly(sound, 50, round(50 * speed))
    if rng.random() < REVERBERANT:
        sound = reverberate(sound, rng, sampling_rate, REVERBERATION_TIME, REVERBERATION_LEVEL)
    return sound


def _draw_crop(
    paths: tuple[Path, ...],
    varied: bool,
    rng: np.random.Generator,
    num_samples: int,
    sampling_rate: int,
    shift: float,
) -> np.ndarray:
    """A crop of a random recording: a synthesiser, but for `paths` and `varied`.

    It has at least LOUD_SHARE of the loudest crop's energy. A recording that is too short stands once, at a random
    place, within zeros. `shift` is ignored: a recording has no parameters to draw outside the training ranges.
    """
    sound = sounding_part(paths[int(rng.integers(len(paths)))], sampling_rate)
    if varied:
        sound = _vary(sound, rng, sampling_rate)
    # A scene fades each source in and out: a click there would be lost.
    margin = min(round(FADE * sampling_rate), (num_samples - 1) // 2)
    crops, energies = _crops(sound, num_samples, margin)
    return crops[rng.choice(np.flatnonzero(energies >= LOUD_SHARE * energies.max()))].copy()


def recorded_synthesisers(folder: str | Path, folds: Collection[int], varied: bool = False) -> dict[str, Synthesiser]:
    """Synthesisers of the ten classes that play recordings of some folds; they can be pickled.

    Each draws a recording and a crop of it that holds sound; it ignores `shift`. Files are decoded when first drawn.

    Args:
        varied: play each at another speed, and some in a room, as other takes of the same sound would be.

    Raises:
        FileNotFoundError, ValueError: as `find_recordings` does, or folds other than 1 to 4, or none.
    """
    if not folds or not set(folds) <= set(FOLDS):
        raise ValueError(f"folds of ESC-10 are {', '.join(map(str, FOLDS))}; give some of them, not {folds!r}")
    return {
        name: partial(_draw_crop, tuple(path for fold in sorted(set(folds)) for path in by_fold[fold]), varied)
        for name, by_fold in find_recordings(folder).items()
    }


def spread_crops(path: Path, count: int = 3, size: int = NUM_SAMPLES) -> list[np.ndarray]:
    """Crops to test on, evenly spread over a recording's sounding part: the first begins where it begins, the last
    ends where it ends. A recording that is shorter stands at evenly spread places within zeros.

    A crop that would fall into a pause (less than AUDIBLE_SHARE of the loudest one's energy) gives way to the nearest
    one that does not.

    Returns:
        `count` crops (size,) float32 at SAMPLING_RATE, with peak PEAK.

    Raises:
        ValueError: a count or size below 1.
        MediaError: as `sounding_part` does.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count={count}, size={size}: both must be at least 1")
    crops, energies = _crops(sounding_part(Path(path)), size, margin=0)
    audible = np.flatnonzero(energies >= AUDIBLE_SHARE * energies.max())
    wanted = np.linspace(0, len(crops) - 1, count).round().astype(int)
    chosen = crops[audible[np.abs(audible - wanted[:, None]).argmin(axis=1)]]
    return list(chosen * (PEAK / np.abs(chosen).max(axis=1, keepdims=True)).astype(np.float32))
