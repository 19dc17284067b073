"""The corpus of a stage: its rows, chosen and prepared as the stage's arguments say."""

import hashlib
import inspect
import os
from pathlib import Path

import torch
from datasets import Array2D, Array3D, Dataset, Features
from datasets.fingerprint import Hasher

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus

from .collators import input_features, open_frame, pixel_values
from .trainers.stage import StageArguments


KEPT = "kept.txt"  # of a pre-filter's folder: an id a line


def load_rows(arguments: StageArguments, split: str | None = None) -> Dataset:
    """
    Rows of `arguments.split`, those in `kept` where it is given, or of another `split`; at most `max_samples`.

    Raises:
        ValueError: when corpus, split or an option is unknown, or the split is empty.
        FileNotFoundError, ValueError: as `keep_rows` does.
    """
    kept = arguments.kept if split in (None, arguments.split) else None
    split = split or arguments.split
    rows = load_corpus(arguments.dataset, split, **{"num_proc": os.cpu_count(), **arguments.dataset_options})
    if kept is not None:
        rows = keep_rows(rows, kept)
    if arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{arguments.dataset}, split {split}: no rows to train on.")
    return rows


def keep_rows(rows: Dataset, folder: str | Path) -> Dataset:
    """
    The rows that a pre-filter kept, in their order.

    Args:
        rows: of the corpus and split that were filtered. Rows that the filter never saw are not kept.
        folder: its output_dir.

    Raises:
        FileNotFoundError: when the folder holds no finished pre-filter.
        ValueError: when none of the rows was kept.
    """
    path = Path(folder) / KEPT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list; run train/prefilter.py to its end first.")
    kept = set(path.read_text(encoding="utf-8").splitlines())
    chosen = [index for index, name in enumerate(rows["id"]) if name in kept]
    if not chosen:
        raise ValueError(f"{path}: holds the id of none of these {len(rows)} rows; was another corpus filtered?")
    return rows.select(chosen)


def with_features(
    rows: Dataset, captioner: LlavaAudioForConditionalGeneration, processor: LlavaAudioProcessor
) -> Dataset:
    """
    What an alignment needs of the rows, computed once and kept on disk by `datasets`.

    Returns:
        `id`; `input_features` (T, mels); `image_tokens` (frames, N, vision width), each frame's from the frozen tower.
    """
    extractor, tower = processor.feature_extractor, captioner.model.eval()

    def compute(batch: dict) -> dict:
        frames = [open_frame({"frames": frames}, index) for frames in batch["frames"] for index in range(len(frames))]
        with torch.no_grad():
            tokens = tower.encode_image(pixel_values(frames, processor).to(captioner.device)).float().cpu()
        return {
            "input_features": input_features([{"audio": audio} for audio in batch["audio"]], processor).numpy(),
            "image_tokens": [part.numpy() for part in tokens.split([len(frames) for frames in batch["frames"]])],
        }

    config = captioner.config
    features = Features(
        {
            "id": rows.features["id"],
            "input_features": Array2D((extractor.max_length, extractor.num_mel_bins), "float32"),
            "image_tokens": Array3D((None, config.image_seq_length, config.vision_config.hidden_size), "float32"),
        }
    )
    rows = rows.select_columns(["id", "audio", "frames"]).map(
        compute,
        batched=True,
        batch_size=64,
        remove_columns=["audio", "frames"],
        features=features,
        new_fingerprint=_features_fingerprint(rows, captioner, processor),
        desc="Features",
    )
    return rows.with_format("numpy", columns=["input_features", "image_tokens"], output_all_columns=True)


def _features_fingerprint(
    rows: Dataset, captioner: LlavaAudioForConditionalGeneration, processor: LlavaAudioProcessor
) -> str:
    """A key of all that `with_features` depends on, the same in every process (a pickled model's is not)."""
    weights = hashlib.sha256()
    for name, tensor in captioner.model.vision_tower.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    extractor, images = processor.feature_extractor, processor.image_processor
    parts = [extractor.to_json_string(), inspect.getsource(type(extractor)), images.to_json_string()]
    layer = [captioner.config.vision_feature_layer, captioner.config.vision_feature_select_strategy]
    return Hasher.hash([rows._fingerprint, weights.hexdigest(), *parts, layer])
