"""The corpus builder of AVWorld."""

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import soundfile
from datasets.builder import Key
from PIL import Image

from ..options import option
from .captions import audio_captions, image_dialogues, pair_dialogues, text_dialogues, visual_captions
from .recordings import CATEGORIES, TEST_FOLD, TRAIN_FOLDS, find_recordings, recorded_synthesisers, recordings_hash
from .scenes import DURATION, SAMPLING_RATE, Scene, another_view, render_audio, render_frames, sample_scene
from .synthesis import Synthesiser


DEFAULT_SIZES: dict[str, int] = {
    "train": 4000,
    "train_captioned": 1000,
    "shots": 64,
    "balanced": 600,
    "val": 300,
    "test": 400,
    "test_shifted": 400,
    "captioner": 14500,
}
SPLITS: tuple[str, ...] = tuple(DEFAULT_SIZES)
CAPTIONED_SPLITS = frozenset({"train_captioned", "shots", "val", "test", "test_shifted"})
TEST_SPLITS = frozenset({"test", "test_shifted"})
TRAINING_SPLITS = frozenset({"train", "balanced"})  # in which recordings are varied, and mostly sound alone
TEXT_ONLY = 0.1  # share of the captioner's rows without a picture
PAIRED = 0.25  # share of its rows with two pictures
SAME_THINGS = 0.5  # share of those in which both pictures show the same things
SHARD_SIZE = 100  # rows; the unit of work of download_and_prepare(num_proc=...)

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")},
        "frames": datasets.List({"path": datasets.Value("string"), "bytes": datasets.Value("binary")}),
        "captions": datasets.List(datasets.Value("string")),
        "labels": datasets.List(datasets.Value("string")),
        "start": datasets.Value("float64"),
        "end": datasets.Value("float64"),
        "source": datasets.Value("string"),
        "visual_captions": datasets.List(datasets.Value("string")),
        "visible": datasets.List(datasets.Value("string")),
        "seen": datasets.List(datasets.Value("string")),
        "dialogues": datasets.List({"question": datasets.Value("string"), "answer": datasets.Value("string")}),
    }
)


@cache
def content_hash() -> str:
    """A digest of this package's source, so that rows made by other code are never taken from a cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass
class AVWorldConfig(datasets.BuilderConfig):
    """Options of `AVWorld`.

    seed: of all rows; splits: those to generate; sizes: rows of a split, where not the default; recordings: the folder
    of ESC-10, whose recordings replace ten classes' synthesisers: folds 1 to 3, in the splits to test on fold 4. In
    `train` and `balanced` they are varied, and these classes are soloists (`sample_scene`).

    Raises:
        ValueError: on an unknown split or a size that is not a positive integer.
        FileNotFoundError, ValueError: on a folder that `find_recordings` rejects.
    """

    name: str = "avworld"
    splits: Sequence[str] = SPLITS
    seed: int = option("seed of all rows", default=0, metavar="N")
    sizes: Mapping[str, int] = option("rows per split, where not the default", default={}, metavar="JSON")
    recordings: str | None = option("folder of ESC-10, to replace ten synthesisers", metavar="DIR")

    def __post_init__(self):
        super().__post_init__()
        self.splits = (self.splits,) if isinstance(self.splits, str) else tuple(self.splits)
        for split in (*self.splits, *self.sizes):
            if split not in DEFAULT_SIZES:
                raise ValueError(f"AVWorld has no split {split!r}; known: {', '.join(SPLITS)}")
        for split, size in self.sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"size of AVWorld split {split!r} must be a positive integer, not {size!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed of AVWorld must be an integer of at least 0, not {self.seed!r}")
        if self.recordings is not None:
            self.recordings = str(self.recordings)
            find_recordings(self.recordings)

    def size(self, split: str) -> int:
        """Rows of a split."""
        return self.sizes.get(split, DEFAULT_SIZES[split])

    def synthesisers(self, split: str) -> dict[str, Synthesiser] | None:
        """What plays the recordings of a split's folds, by class; None where there are no recordings."""
        if self.recordings is None:
            return None
        folds = (TEST_FOLD,) if split in TEST_SPLITS else TRAIN_FOLDS
        return recorded_synthesisers(self.recordings, folds, varied=split in TRAINING_SPLITS)

    def soloists(self, split: str) -> tuple[str, ...]:
        """The classes that mostly sound alone in a split: those of the recordings, where a stage trains on them."""
        return tuple(CATEGORIES) if self.recordings is not None and split in TRAINING_SPLITS else ()

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """A cache key of the options that matter, of the recordings where a split plays them, and of this package's
        source."""
        options = [self.seed, {split: self.size(split) for split in self.splits}, content_hash()]
        options.append(str(custom_features or ""))
        if self.recordings is not None and set(self.splits) != {"captioner"}:
            options.append(recordings_hash(self.recordings))
        return f"{self.name}-{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]}"


def _encode_audio(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _encode_frame(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def scene_of(
    split: str, index: int, seed: int = 0, soloists: Collection[str] = ()
) -> tuple[Scene, list[np.random.Generator]]:
    """The scene of a row, and generators for its sound, its frames and its text; `soloists` as in `sample_scene`.

    All spring from (seed, split, index) alone, each from a stream of its own.
    """
    streams = np.random.SeedSequence([seed, SPLITS.index(split), index]).spawn(4)
    draws, *others = (np.random.default_rng(stream) for stream in streams)
    scene = sample_scene(
        draws,
        shifted=split == "test_shifted",
        curated=split == "shots",
        flattened=split in ("captioner", "shots"),
        soloists=soloists,
    )
    return scene, others


def _captioner_columns(name: str, scene: Scene, sight: np.random.Generator, text: np.random.Generator) -> dict:
    """What a row of `captioner` holds besides: text alone, a picture, or two: the scene's and another's."""
    kind = text.random()
    if kind < TEXT_ONLY:
        return {"dialogues": text_dialogues(scene, text), "visible": [], "seen": []}
    scenes = [scene]
    if kind < TEXT_ONLY + PAIRED:
        same = sight.random() < SAME_THINGS
        scenes.append(another_view(scene, sight) if same else sample_scene(sight, flattened=True))
        columns = {"dialogues": pair_dialogues(*scenes, text)}
        for column in ("audible", "visible", "seen"):
            together = [entity.name for each in scenes for entity in getattr(each, column)]
            columns["labels" if column == "audible" else column] = list(dict.fromkeys(together))
    else:
        columns = {"dialogues": image_dialogues(scene, text), "visual_captions": visual_captions(scene)}
    frames = [render_frames(each, sight, 1)[0] for each in scenes]
    columns["frames"] = [
        {"path": f"{name}-{number}.png", "bytes": _encode_frame(frame)} for number, frame in enumerate(frames)
    ]
    return columns


def make_row(
    split: str,
    index: int,
    seed: int = 0,
    synthesisers: Mapping[str, Synthesiser] | None = None,
    soloists: Collection[str] = (),
) -> dict:
    """One row of a split, as in `AVWorld`; `synthesisers` as in `render_audio`, `soloists` as in `sample_scene`."""
    scene, (sound, sight, text) = scene_of(split, index, seed, soloists)
    row = {
        "id": f"{split}-{index:06d}",
        "audio": None,
        "frames": [],
        "captions": [],
        "labels": [entity.name for entity in scene.audible],
        "start": 0.0,
        "end": DURATION,
        "source": "avworld",
        "visual_captions": [],
        "visible": [entity.name for entity in scene.visible],
        "seen": [entity.name for entity in scene.seen],
        "dialogues": [],
    }
    if split == "captioner":
        return row | _captioner_columns(row["id"], scene, sight, text)
    row["audio"] = {"path": f"{row['id']}.flac", "bytes": _encode_audio(render_audio(scene, sound, synthesisers))}
    row["frames"] = [
        {"path": f"{row['id']}-{number}.png", "bytes": _encode_frame(frame)}
        for number, frame in enumerate(render_frames(scene, sight))
    ]
    if split in CAPTIONED_SPLITS:
        captions = audio_captions(scene, text, as_seen=split == "shots")
        row |= {"captions": captions, "visual_captions": visual_captions(scene)}
    return row


class AVWorld(datasets.GeneratorBasedBuilder):
    """A procedural audiovisual world.

    A row is a clip of 2.56 s:
        id: str
        audio: {path, bytes}, FLAC, 16 kHz mono; None in `captioner`
        frames: list of {path, bytes}, PNG, 48 x 48 RGB: four; in `captioner` one, or two of two scenes, or none
            (text alone)
        captions: what is heard, five paraphrases, the first canonical; empty in `train`, `balanced`, `captioner`
        labels: the classes that sound, the loudest first
        start, end: of the clip within its source, in seconds
        source: "avworld"
        visual_captions: what is seen, four paraphrases; empty where `captions` is, but not in `captioner`'s rows with
            one picture
        visible: all that shows, in reading order, silent objects included; `labels`, `visible` and `seen` of a row
            with two scenes are of both
        seen: the classes that sound and show and look like no other
        dialogues: {question, answer}, in `captioner` only

    Splits: `train`, `train_captioned`, `shots` (all sources sound and show), `balanced` (a smaller `train`), `val`,
    `test`, `test_shifted` (parameters, noise and reverberation outside the training ranges), `captioner`.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = AVWorldConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="AVWorld, a procedural audiovisual world", features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        generators = []
        for split in self.config.splits:
            size = self.config.size(split)
            ranges = [(start, min(start + SHARD_SIZE, size)) for start in range(0, size, SHARD_SIZE)]
            generators.append(datasets.SplitGenerator(split, gen_kwargs={"split": split, "ranges": ranges}))
        return generators

    def _generate_examples(self, split: str, ranges: list[tuple[int, int]]) -> Iterator[tuple[Key, dict]]:
        synthesisers, soloists = self.config.synthesisers(split), self.config.soloists(split)
        for number, (start, stop) in enumerate(ranges):
            for index in range(start, stop):
                yield Key(number, index - start), make_row(split, index, self.config.seed, synthesisers, soloists)
