"""Scenes of AVWorld: sampling of their contents, and rendering of their audio and frames."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.signal import lfilter

from .classes import BACKGROUNDS, CLASSES, COLOURS, LOOK_AMBIGUOUS, RIVALS, SILENT_OBJECTS, sprite_of
from .signals import noise, reverberate
from .sprites import MASKS
from .synthesis import SYNTHESISERS, Synthesiser


SAMPLING_RATE = 16000
NUM_SAMPLES = 40960  # 2.56 s: 256 frames of 10 ms
DURATION = NUM_SAMPLES / SAMPLING_RATE
IMAGE_SIZE = 48
GRID = 2
CELL = IMAGE_SIZE // GRID
NUM_FRAMES = 4

# Contents of a scene.
SOURCE_COUNTS = (0.72, 0.20, 0.08)  # probabilities of 1, 2, 3 audible sources
SILENT_OBJECT_COUNTS = (0.75, 0.20, 0.05)  # probabilities of 0, 1, 2 silent objects
OFF_SCREEN = 0.15  # share of audible sources that are not visible
SILENT_SOURCE = 0.10  # share of visible objects of sounding classes that are silent
TYPICAL = 0.8  # share of objects in the colour of their class, and of scenes at the place of their first source

# Soloists: the classes with recordings. There are few recordings, so most of their scenes have no other source.
SOLO = 0.8  # share of the scenes with a soloist in which it sounds alone
SOLOIST_WEIGHT = 2.0  # weight of all soloists together, relative to the same classes without recordings

# Audio difficulty.
MIN_SECONDS = 1.0  # minimum duration of a source
FULL_LENGTH = 0.35  # share of sources that sound throughout
LEVEL_SPREAD = 6.0  # largest difference in dB between the levels of two sources
SNR = (4.0, 20.0)  # level of the loudest source relative to the noise, in dB
NOISE_POLE = (0.0, 0.95)  # pole of the one-pole filter that colours the noise
FADE = 0.02  # seconds of fade-in and fade-out of a source
PEAK = 0.9

# Values outside the training ranges, for `test_shifted`.
SHIFTED_SNR = (1.0, 4.0)
SHIFTED_NOISE_POLE = (-0.3, -0.05)  # brighter than white
REVERBERATION_TIME = (0.2, 0.5)  # seconds to -60 dB
REVERBERATION_LEVEL = (-12.0, -6.0)  # level of reverberant relative to direct sound, in dB

# Image difficulty.
MOTION = 1  # largest horizontal offset of an object, in pixels
PLATE = (0, 0, 0)  # colour of the square behind an object, which makes its shape visible on every background
GRAIN = 8  # standard deviation of the image noise, on the scale of 0 to 255


@dataclass(frozen=True)
class Entity:
    """An object in a scene.

    Attributes:
        name: name of a sounding class or a silent object.
        colour: name of its colour.
        cell: 0 to 3 in reading order, or None if it is not visible.
        span: (start, end) of its sound in seconds, or None if it is silent.
        level: dB relative to the loudest source.
    """

    name: str
    colour: str
    cell: int | None
    span: tuple[float, float] | None
    level: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A scene, which determines the captions and the ground truth.

    Attributes:
        entities: objects of the scene.
        background: name of the background.
        snr: level of the loudest source relative to the noise, in dB.
        shift: 0 for parameters inside the training ranges, 1 for parameters outside.
    """

    entities: tuple[Entity, ...]
    background: str
    snr: float
    shift: float = 0.0

    @property
    def audible(self) -> list[Entity]:
        """Audible objects, in order of decreasing loudness."""
        return sorted((e for e in self.entities if e.span is not None), key=lambda entity: -entity.level)

    @property
    def visible(self) -> list[Entity]:
        """Visible objects, in reading order of the grid."""
        return sorted((e for e in self.entities if e.cell is not None), key=lambda entity: entity.cell)

    @property
    def seen(self) -> list[Entity]:
        """Objects that are audible, visible and not visually ambiguous, in order of decreasing loudness."""
        return [e for e in self.audible if e.cell is not None and e.name not in LOOK_AMBIGUOUS]


_NAMES = tuple(CLASSES)
_WEIGHTS = np.array([sounding.weight for sounding in CLASSES.values()])


def _draw_class(rng: np.random.Generator, excluded: set[str], cumulative: np.ndarray) -> str:
    """Draw a class by weight, and exclude it and the other class of its pair from further draws."""
    while True:
        name = _NAMES[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))]
        if name not in excluded:
            excluded.update({name, RIVALS.get(name, name)})
            return name


def _draw_span(rng: np.random.Generator) -> tuple[float, float]:
    length = DURATION if rng.random() < FULL_LENGTH else rng.uniform(MIN_SECONDS, DURATION)
    start = rng.uniform(0, DURATION - length)
    return start, start + length


def _even_weights(weights: np.ndarray, classes: Collection[str]) -> np.ndarray:
    """Replace the weights of `classes` with SOLOIST_WEIGHT times their mean."""
    chosen = np.isin(_NAMES, tuple(classes))
    return np.where(chosen, SOLOIST_WEIGHT * weights[chosen].mean(), weights) if chosen.any() else weights


def sample_scene(
    rng: np.random.Generator,
    shifted: bool = False,
    curated: bool = False,
    flattened: bool = False,
    soloists: Collection[str] = (),
) -> Scene:
    """Draw a scene.

    At least one object is audible and at least one is visible. Silent objects of sounding classes are added so that
    they make up SILENT_SOURCE of all visible objects of sounding classes.

    Args:
        rng: random generator.
        shifted: if True, draw from the ranges of `test_shifted`.
        curated: if True, draw a scene that a user would choose as an example: all audible objects are visible, and all
            objects of sounding classes are audible.
        flattened: if True, draw classes and numbers of sources by the square root of their weights, which gives more
            objects per scene and more rare classes.
        soloists: classes that are drawn with equal probability, with SOLOIST_WEIGHT times their total weight. In SOLO
            of the scenes with a soloist, it is visible, sounds throughout, and is the only object of a sounding class.
    """
    weights = np.sqrt(_WEIGHTS) if flattened else _WEIGHTS
    cumulative = np.cumsum(_even_weights(weights, soloists))
    counts = np.sqrt(SOURCE_COUNTS) if flattened else np.asarray(SOURCE_COUNTS)
    excluded: set[str] = set()
    count = 1 + int(rng.choice(len(counts), p=counts / counts.sum()))
    levels = -LEVEL_SPREAD * rng.random(count)
    levels -= levels.max()
    # (name, span, level, shows)
    things: list[tuple[str, tuple[float, float] | None, float, bool]] = []
    for level in levels:
        shows = curated or rng.random() >= OFF_SCREEN
        things.append((_draw_class(rng, excluded, cumulative), _draw_span(rng), float(level), shows))
    solo = next((name for name, *_ in things if name in soloists), None)
    if solo is not None and rng.random() >= SOLO:
        solo = None
    if solo is not None:
        things = [(solo, (0.0, DURATION), 0.0, True)]
    room = GRID * GRID - sum(shows for *_, shows in things)
    for _ in range(0 if curated or solo is not None else sum(shows for *_, shows in things)):
        if room and rng.random() < SILENT_SOURCE / (1 - SILENT_SOURCE):
            things.append((_draw_class(rng, excluded, cumulative), None, 0.0, True))
            room -= 1
    objects = int(rng.choice(len(SILENT_OBJECT_COUNTS), p=SILENT_OBJECT_COUNTS))
    objects = min(max(objects, int(room == GRID * GRID)), room)
    things += [(str(name), None, 0.0, True) for name in rng.choice(SILENT_OBJECTS, objects, replace=False)]

    cells = iter(rng.permutation(GRID * GRID).tolist())
    colours = [
        CLASSES[name].colour if name in CLASSES and rng.random() < TYPICAL else str(rng.choice(tuple(COLOURS)))
        for name, *_ in things
    ]
    entities = tuple(
        Entity(name, colour, next(cells) if shows else None, span, level)
        for (name, span, level, shows), colour in zip(things, colours, strict=True)
    )
    typical = rng.random() < TYPICAL
    background = CLASSES[things[0][0]].place if typical else str(rng.choice(tuple(BACKGROUNDS)))
    return Scene(entities, background, float(rng.uniform(*(SHIFTED_SNR if shifted else SNR))), float(shifted))


def another_view(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene of the same objects with other colours, cells and background."""
    cells = iter(rng.permutation(GRID * GRID).tolist())
    entities = tuple(
        replace(
            entity,
            colour=str(rng.choice(tuple(COLOURS))),
            cell=None if entity.cell is None else next(cells),
        )
        for entity in scene.entities
    )
    return replace(scene, entities=entities, background=str(rng.choice(tuple(BACKGROUNDS))))


def _normalise(signal: np.ndarray) -> np.ndarray:
    """Scale to unit power over the 20 ms frames within 20 dB of the loudest, so that pauses are ignored."""
    size = SAMPLING_RATE // 50
    power = np.square(signal[: signal.size // size * size].reshape(-1, size)).mean(axis=1)
    return signal / np.sqrt(power[power >= 0.01 * power.max()].mean() + 1e-12)


def render_audio(
    scene: Scene, rng: np.random.Generator, synthesisers: Mapping[str, Synthesiser] | None = None
) -> np.ndarray:
    """Render the audio of a scene.

    Args:
        scene: scene to render.
        rng: random generator.
        synthesisers: synthesisers that replace the built-in ones, by class name, for some or all classes. They play
            recordings, which contain background noise, so no noise is added to a scene that uses one of them.

    Returns:
        (NUM_SAMPLES,) float32 at SAMPLING_RATE, with peak amplitude PEAK.
    """
    synthesisers = synthesisers or {}
    mix = np.zeros(NUM_SAMPLES, dtype=np.float32)
    fade_size = int(FADE * SAMPLING_RATE)
    fade = np.linspace(0, 1, fade_size, dtype=np.float32)
    for entity in scene.audible:
        synthesiser = synthesisers.get(entity.name) or SYNTHESISERS[CLASSES[entity.name].synthesiser]
        start, end = (round(time * SAMPLING_RATE) for time in entity.span)
        signal = _normalise(synthesiser(rng, end - start, SAMPLING_RATE, scene.shift))
        signal[:fade_size] *= fade
        signal[-fade_size:] *= fade[::-1]
        mix[start:end] += np.float32(10 ** (entity.level / 20)) * signal
    if scene.shift:
        mix = reverberate(mix, rng, SAMPLING_RATE, REVERBERATION_TIME, REVERBERATION_LEVEL)
    if not any(entity.name in synthesisers for entity in scene.audible):
        pole = rng.uniform(*(SHIFTED_NOISE_POLE if scene.shift else NOISE_POLE))
        # Filtered white noise has variance 1 / (1 - pole^2).
        hiss = lfilter([np.sqrt(1 - pole**2)], [1.0, -pole], noise(rng, NUM_SAMPLES)).astype(np.float32)
        mix += np.float32(10 ** (-scene.snr / 20)) * hiss
    return mix * np.float32(PEAK / np.abs(mix).max())


def _paint_background(background: str, rng: np.random.Generator) -> np.ndarray:
    """Background image (IMAGE_SIZE, IMAGE_SIZE, 3) float32. Each background has its own texture, randomly shifted."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + rng.integers(0, IMAGE_SIZE, 2)[:, None, None]
    texture = {
        "grass": np.where((columns + rows // 4 * 3) % 5 == 0, 22, 0),  # blades
        "snow": np.where((rows * 5 + columns * 3) % 19 == 0, -28, 0),  # flakes
        "sand": 12 * np.sin((rows + 2 * np.sin(columns / 5)) * 1.1),  # ripples
        "street": np.where((rows % 8 == 0) & (columns % 16 < 10), 45, 0),  # lane marks
        "room": np.where((rows % 6 == 0) | ((columns + rows // 6 % 2 * 5) % 10 == 0), -28, 0),  # bricks
        "cave": np.where((rows // 3 * 7 + columns // 3 * 11) % 13 < 3, 20, 0),  # stones
    }[background]
    return texture[:, :, None].astype(np.float32) + np.asarray(BACKGROUNDS[background].colour, dtype=np.float32)


def render_frames(scene: Scene, rng: np.random.Generator, num_frames: int = NUM_FRAMES) -> list[np.ndarray]:
    """Render the frames of a scene. The objects move randomly within their cells from frame to frame.

    Returns:
        num_frames arrays (IMAGE_SIZE, IMAGE_SIZE, 3) uint8.
    """
    ground = _paint_background(scene.background, rng)
    frames = []
    for _ in range(num_frames):
        frame = ground.copy()
        for entity in scene.visible:
            row, column = divmod(entity.cell, GRID)
            top, left = row * CELL, column * CELL + int(rng.integers(-MOTION, MOTION + 1))
            left = min(max(left, 0), IMAGE_SIZE - CELL)
            cell = frame[top : top + CELL, left : left + CELL]
            cell[:] = PLATE
            cell[MASKS[sprite_of(entity.name)]] = COLOURS[entity.colour]
        frame += GRAIN * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32)
        frames.append(np.clip(frame, 0, 255).round().astype(np.uint8))
    return frames
