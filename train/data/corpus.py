"""Load and select the rows of a corpus that a stage trains on."""

import hashlib
import inspect
import logging
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from datasets import Array2D, Array3D, Dataset, Features, IterableDataset
from datasets.fingerprint import Hasher

from dali_llava.modeling import LlavaAudioModel, LlavaAudioTowers
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.rows import open_audio, open_frames
from dali_llava.processing.media import MediaError
from dali_llava.train.arguments import SoundArguments, StageArguments
from dali_llava.train.data.collators import input_features, pixel_values


logger = logging.getLogger(__name__)

SEEN_FIRST = 20  # number of rows checked for pictures; at least one must have one
KEPT = "kept.txt"  # list in the output folder of a pre-filter, with one id per line


def load_rows(arguments: StageArguments, split: str | None = None) -> Dataset:
    """
    Load the rows of a split, at most `arguments.max_samples`.

    Args:
        arguments: arguments of the stage.
        split: split to load instead of `arguments.split`. `kept` and `max_samples` apply to the latter only.

    Raises:
        ValueError: if the corpus, the split or an option is unknown, or the split is empty.
        FileNotFoundError, ValueError: as in `keep_rows`.
    """
    selected = split in (None, arguments.split)
    split = split or arguments.split
    rows = load_corpus(arguments.dataset, split, **{"num_proc": os.cpu_count(), **arguments.dataset_options})
    if selected and arguments.kept is not None:
        rows = keep_rows(rows, arguments.kept)
    if selected and arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{arguments.dataset}, split {split}: no rows to train on.")
    return rows


def evaluation_rows(arguments: StageArguments) -> Dataset | None:
    """Load the rows of `arguments.eval_split`, all of them, or return None. Raises the errors of `load_rows`."""
    if arguments.eval_split is None:
        return None
    return load_rows(arguments, arguments.eval_split)


def stream_rows(arguments: SoundArguments) -> IterableDataset:
    """
    Load the rows of `load_rows` as a stream that repeats without end.

    Ranks and DataLoader workers read their own parts of the stream if the corpus has enough shards.

    Raises:
        ValueError: as in `load_rows`, or if an argument is not supported for streams.
        FileNotFoundError: as in `load_rows`.
    """
    if arguments.max_steps <= 0:
        raise ValueError("streaming: a stream has no end; give the number of steps, --max_steps N.")
    for name in ("cache_features", "halve_every"):
        if getattr(arguments, name, False):
            raise ValueError(f"streaming: {name} is not supported for streams; disable one of the two, --{name} 0.")
    rows = load_corpus(arguments.dataset, arguments.split, streaming=True, **arguments.dataset_options)
    if arguments.kept is not None:
        kept = kept_ids(arguments.kept)
        rows = rows.filter(lambda name: name in kept, input_columns="id")
    if arguments.max_samples is not None:
        rows = rows.take(arguments.max_samples)
    if next(iter(rows), None) is None:
        raise ValueError(f"{arguments.dataset}, split {arguments.split}: no rows to train on.")
    return rows.repeat(None)


def open_rows(arguments: SoundArguments, pictures: bool) -> Dataset | IterableDataset:
    """
    Load the rows of a stage that trains the audio tower, as a stream if `arguments.streaming`.

    Args:
        arguments: arguments of the stage.
        pictures: whether the stage needs pictures.

    Raises:
        ValueError, FileNotFoundError: as in `load_rows`, `stream_rows` and `check_pictures`.
    """
    rows = stream_rows(arguments) if arguments.streaming else load_rows(arguments)
    if pictures:
        check_pictures(rows, arguments)
    return rows


def shuffled(rows: Dataset | IterableDataset, arguments: SoundArguments) -> Dataset | IterableDataset:
    """Shuffle a stream. A `Dataset` is returned unchanged, because the DataLoader shuffles it in each epoch."""
    if not arguments.streaming:
        return rows
    return rows.shuffle(arguments.seed, buffer_size=arguments.shuffle_buffer)


def check_pictures(rows: Iterable[dict], arguments: SoundArguments) -> None:
    """Raise a ValueError if none of the first rows has a picture."""
    if not any(row["frames"] for row in islice(rows, SEEN_FIRST)):
        raise ValueError(f"{arguments.dataset}, split {arguments.split}: no pictures, which the alignment needs.")


def kept_ids(folder: str | Path) -> set[str]:
    """Return the ids that a pre-filter kept. Raises FileNotFoundError if the folder has no finished pre-filter."""
    path = Path(folder) / KEPT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the list does not exist; complete the run of train/prefilter.py first.")
    return set(path.read_text(encoding="utf-8").splitlines())


def keep_rows(rows: Dataset, folder: str | Path) -> Dataset:
    """
    Select the rows that a pre-filter kept, in their order.

    Args:
        rows: rows of the corpus and split that were filtered. Rows that the pre-filter did not score are not kept.
        folder: output folder of the pre-filter.

    Raises:
        FileNotFoundError: if the folder has no finished pre-filter.
        ValueError: if none of the rows was kept.
    """
    kept = kept_ids(folder)
    chosen = [index for index, name in enumerate(rows["id"]) if name in kept]
    if not chosen:
        raise ValueError(
            f"{Path(folder) / KEPT}: contains none of the ids of these {len(rows)} rows; filter this corpus and split."
        )
    return rows.select(chosen)


def with_features(
    rows: Dataset, towers: LlavaAudioTowers | LlavaAudioModel, processor: LlavaAudioProcessor
) -> Dataset:
    """
    Compute the features that the alignment needs. `datasets` caches them on disk.

    Clips that cannot be opened are skipped with a warning.

    Args:
        rows: rows of a corpus.
        towers: the model that encodes the images.
        processor: its processor.

    Returns:
        rows with `id`, `input_features` (T, mels) and `image_tokens` (frames, N, vision width).

    Raises:
        ValueError: if no clip can be opened.
    """
    extractor = processor.feature_extractor
    towers.eval()

    def compute(batch: dict) -> dict:
        names, sounds, pictures = [], [], []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                sound, frames = open_audio(row, extractor.sampling_rate), open_frames(row)
            except MediaError as error:
                logger.warning("%s; the clip is skipped", error)
                continue
            names.append(row["id"])
            sounds.append(sound)
            pictures.append(frames)
        if not names:
            return {"id": [], "input_features": [], "image_tokens": []}
        pixels = pixel_values([frame for frames in pictures for frame in frames], processor)
        with torch.no_grad():
            tokens = towers.encode_image(pixels.to(towers.device)).float().cpu()
        return {
            "id": names,
            "input_features": input_features(sounds, processor).numpy(),
            "image_tokens": [part.numpy() for part in tokens.split([len(frames) for frames in pictures])],
        }

    config = towers.config
    features = Features(
        {
            "id": rows.features["id"],
            "input_features": Array2D((extractor.max_length, extractor.num_mel_bins), "float32"),
            "image_tokens": Array3D((None, config.image_seq_length, config.vision_config.hidden_size), "float32"),
        }
    )
    media = rows.select_columns(["id", "audio", "frames", "start", "end"])
    stored = media.map(
        compute,
        batched=True,
        batch_size=64,
        remove_columns=["audio", "frames", "start", "end"],
        features=features,
        new_fingerprint=_features_fingerprint(rows, towers, processor),
        desc="Features",
    )
    if len(stored) == 0:
        raise ValueError(f"none of {len(rows)} clips can be opened; `dali-llava inspect --check 100` shows why.")
    return stored.with_format("numpy", columns=["input_features", "image_tokens"], output_all_columns=True)


def _features_fingerprint(
    rows: Dataset, towers: LlavaAudioTowers | LlavaAudioModel, processor: LlavaAudioProcessor
) -> str:
    """Return a hash of everything that `with_features` depends on. It is the same in all processes, unlike a hash of a
    pickled model."""
    weights = hashlib.sha256()
    for name, tensor in towers.vision_tower.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    extractor, images = processor.feature_extractor, processor.image_processor
    parts = [extractor.to_json_string(), inspect.getsource(type(extractor)), images.to_json_string()]
    layer = [towers.config.vision_feature_layer, towers.config.vision_feature_select_strategy]
    return Hasher.hash([rows._fingerprint, weights.hexdigest(), *parts, layer])
