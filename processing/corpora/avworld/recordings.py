"""Real recordings in AVWorld: ESC-10 in place of the synthesisers of ten classes.

The files of ESC-10 are named `NNN - CATEGORY/FOLD-CLIPID-TAKE.ogg`. All takes of one source are in the same fold. Many
clips consist of a short sound within digital silence, so crops are selected to contain sound.

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
SILENCE = 0.01  # amplitude relative to the peak, below which the ends of a recording are trimmed
LOUD_SHARE = 0.5  # minimum energy of a random crop, relative to the loudest crop of the recording
AUDIBLE_SHARE = 0.05  # minimum energy of a test crop, relative to the loudest crop of the recording
LARGEST_SPEED = 1.2  # maximum playback speed of a varied recording; the minimum is its inverse
REVERBERANT = 0.3  # share of varied recordings with added reverberation
REVERBERATION_TIME = (0.1, 0.5)  # seconds to -60 dB
REVERBERATION_LEVEL = (-12.0, 0.0)  # dB, reverberant over direct sound

_REMEDY = "give the folder of ESC-10, which contains '001 - Dog bark' ... '010 - Fire crackling'"
_FOLDER_NAME = re.compile(r"\d+\s*-\s*(.+)")
_FILE_NAME = re.compile(r"(\d+)-\d+-[A-Z]\.(?:ogg|wav)", re.IGNORECASE)


def _category_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each class. Other files and folders are ignored."""
    classes = {category.casefold(): name for name, category in CATEGORIES.items()}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FOLDER_NAME.fullmatch(path.name)
        name = match and classes.get(match[1].strip().casefold())
        if name and path.is_dir():
            found.setdefault(name, []).append(path)
    return found


def _by_fold(folders: list[Path]) -> dict[int, list[Path]]:
    """Return the recordings of one class by fold."""
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
    """Find the recordings of ESC-10 by the category in the folder names, ignoring numbers and case.

    Returns:
        sorted files by class of AVWorld and fold.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if classes are missing or have no recordings in one of the folds 1 to 4 (all of them are named),
            or if a file is not named `FOLD-CLIPID-TAKE.ogg` or `.wav`.
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
    """Digest of the names and sizes of the recordings, independent of the location of the folder.

    Raises:
        FileNotFoundError, ValueError: as in `find_recordings`.
    """
    digest = hashlib.sha256()
    for folds in find_recordings(folder).values():
        for path in (path for fold in sorted(folds) for path in folds[fold]):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


@cache
def sounding_part(path: Path, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Load a recording without the silence at its ends.

    Each file is decoded once per process.

    Returns:
        (samples,) float32, mono, read-only.

    Raises:
        MediaError: if the file cannot be decoded or contains only silence.
    """
    samples = load_audio(path, sampling_rate)
    level = np.abs(samples)
    if not level.any():
        raise MediaError(f"{path}: contains only silence; download it again or remove it")
    loud = np.flatnonzero(level >= SILENCE * level.max())
    sound = samples[loud[0] : loud[-1] + 1].copy()
    sound.flags.writeable = False
    return sound


def _crops(sound: np.ndarray, size: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all crops of a sound, and their energies without `margin` samples at each end.

    The sound is padded with `margin` zeros at both ends, or with more if it is shorter than `size`, so that each of
    its samples is in the inner part of at least one crop.

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
    """Change the speed, and with it the pitch, of a sound, and sometimes add reverberation."""
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
    """Draw a crop of a random recording. With `paths` and `varied` bound, this function is a synthesiser.

    The crop has at least LOUD_SHARE of the energy of the loudest crop. A recording that is too short is placed at a
    random position within zeros. `shift` is ignored, because a recording has no parameters to shift.
    """
    sound = sounding_part(paths[int(rng.integers(len(paths)))], sampling_rate)
    if varied:
        sound = _vary(sound, rng, sampling_rate)
    # A scene fades each source in and out, so sound within the fades does not count.
    margin = min(round(FADE * sampling_rate), (num_samples - 1) // 2)
    crops, energies = _crops(sound, num_samples, margin)
    return crops[rng.choice(np.flatnonzero(energies >= LOUD_SHARE * energies.max()))].copy()


def recorded_synthesisers(folder: str | Path, folds: Collection[int], varied: bool = False) -> dict[str, Synthesiser]:
    """Return picklable synthesisers of ten classes that play the recordings of the given folds.

    Each call draws a recording and a crop of it that contains sound; `shift` is ignored. Files are decoded on first
    use.

    Args:
        folder: folder of ESC-10.
        folds: folds to draw from, of 1 to 4.
        varied: if True, change the speed of each recording and add reverberation to some, to simulate other takes.

    Raises:
        FileNotFoundError, ValueError: as in `find_recordings`.
        ValueError: if no folds are given, or folds other than 1 to 4.
    """
    if not folds or not set(folds) <= set(FOLDS):
        raise ValueError(f"folds must be one or more of {', '.join(map(str, FOLDS))}, not {folds!r}")
    return {
        name: partial(_draw_crop, tuple(path for fold in sorted(set(folds)) for path in by_fold[fold]), varied)
        for name, by_fold in find_recordings(folder).items()
    }


def spread_crops(path: Path, count: int = 3, size: int = NUM_SAMPLES) -> list[np.ndarray]:
    """Return evenly spaced crops of a recording for testing.

    The first crop starts at the beginning of the sounding part and the last crop ends at its end. A shorter recording
    is placed at evenly spaced positions within zeros. A crop in a pause, with less than AUDIBLE_SHARE of the energy of
    the loudest crop, is replaced with the nearest crop that is not.

    Args:
        path: file of the recording.
        count: number of crops.
        size: samples per crop.

    Returns:
        `count` arrays (size,) float32 at SAMPLING_RATE, with peak amplitude PEAK.

    Raises:
        ValueError: if `count` or `size` is less than 1.
        MediaError: as in `sounding_part`.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count={count}, size={size}: both must be at least 1")
    crops, energies = _crops(sounding_part(Path(path)), size, margin=0)
    audible = np.flatnonzero(energies >= AUDIBLE_SHARE * energies.max())
    wanted = np.linspace(0, len(crops) - 1, count).round().astype(int)
    chosen = crops[audible[np.abs(audible - wanted[:, None]).argmin(axis=1)]]
    return list(chosen * (PEAK / np.abs(chosen).max(axis=1, keepdims=True)).astype(np.float32))
