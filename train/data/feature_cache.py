"""Image tokens and spectrograms of a corpus, computed once over all ranks and stored on disk."""

import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from tqdm import tqdm

from dali_llava.modeling import LlavaAudioModel, LlavaAudioTowers
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora.members import file_of
from dali_llava.processing.corpora.rows import count_frames, open_audio, open_frames
from dali_llava.processing.media import MediaError
from dali_llava.train.data.clips import MOST_IN_A_ROW, Row
from dali_llava.train.data.collators import input_features, pixel_values
from dali_llava.train.data.feature_shards import SOUNDS, TOKENS, CachedFeatures, FeatureShards


logger = logging.getLogger(__name__)

FORMAT = 1  # version of the files, part of the key
SHARD_BYTES = 2**29
SHARD_CLIPS = 1024  # bound for small features, so that several ranks share a small corpus
IMAGES_AT_ONCE = 64  # in one forward pass of the vision tower
COUNTED_FIRST = 20  # number of clips whose frames are counted to estimate the number of all frames


@dataclass(frozen=True)
class FeatureChoice:
    """
    Which features of a clip are stored.

    Args:
        frames: number of frames per clip, evenly spaced; all frames if None. A shorter clip has all its frames.
        frame: index of a single frame to store instead.
        sounds: whether to store spectrograms.
        dtype: dtype of the image tokens. Spectrograms are float32.
    """

    frames: int | None = 1
    frame: int | None = None
    sounds: bool = False
    dtype: torch.dtype = torch.bfloat16

    def seconds(self, row: Row) -> list[int]:
        """
        Return the indices of the frames to store. One frame is the middle one, as in `open_middle_frame`.

        Raises:
            MediaError: as in `count_frames`.
        """
        if self.frame is not None:
            return [self.frame]
        count = count_frames(row)
        if self.frames is None or count <= self.frames:
            return list(range(count))
        return [(2 * index + 1) * count // (2 * self.frames) for index in range(self.frames)]


@dataclass(frozen=True)
class ClipReader:
    """
    Collates rows into `pixel_values` (all frames, 3, H, W), `input_features` (opened clips, T, mels) if they are
    stored, the number of `frames` of each clip, and the `errors` of clips that cannot be opened, else None.
    """

    processor: LlavaAudioProcessor
    choice: FeatureChoice

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        pictures, sounds, frames, errors = [], [], [], []
        for row in rows:
            try:
                opened = open_frames(row, self.choice.seconds(row))
                if self.choice.sounds:
                    sounds.append(open_audio(row, self.processor.feature_extractor.sampling_rate))
                pictures += opened
                frames.append(len(opened))
                errors.append(None)
            except MediaError as error:
                frames.append(0)
                errors.append(str(error))
        batch = {"frames": frames, "errors": errors}
        if pictures:
            batch["pixel_values"] = pixel_values(pictures, self.processor)
        if sounds:
            batch[SOUNDS] = torch.as_tensor(input_features(sounds, self.processor))
        return batch


def with_features(
    rows: datasets.Dataset,
    towers: LlavaAudioTowers | LlavaAudioModel,
    processor: LlavaAudioProcessor,
    choice: FeatureChoice = FeatureChoice(),
    *,
    folder: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    num_workers: int = 0,
) -> datasets.Dataset:
    """
    Compute the features that the alignment needs, or find them on disk.

    All ranks must call it, before the training engine partitions the weights. Each rank computes a part of the
    missing shards, and an interrupted run continues with those that it lacks. Clips that cannot be opened are left
    out with a warning, and are not tried again.

    Args:
        rows: rows of a corpus.
        towers: the model that encodes the images.
        processor: its processor.
        choice: the features to store.
        folder: folder of the features, which all ranks share; by default one in the cache of `datasets` whose name
            depends on the clips, the weights of the vision tower, the processor and `choice`.
        device: device to encode on; by default that of the model. The vision tower is moved there.
        num_workers: number of processes that open the media.

    Returns:
        rows with `id` and `image_tokens` (frames, N, vision width), and either `input_features` (T, mels) or the
        columns of the sound. Features are read and verified on access.

    Raises:
        ValueError: if the disk is too small, no clip can be opened, or the folder contains damaged features or those
            of other clips or models.
        MediaError: if 100 consecutive clips cannot be opened.
    """
    state = PartialState()
    shards = _shards(rows, towers, processor, choice, folder)
    shards.folder.mkdir(parents=True, exist_ok=True)
    missing = shards.missing()
    if missing:
        whole = _clip_bytes(rows, towers, processor, choice) * len(rows)
        _check_space(shards, int(whole * len(missing) / len(shards)))
    agreed = [missing]
    broadcast_object_list(agreed)  # the shards that the first rank lacks, before any rank writes one
    if agreed[0]:
        if state.is_main_process:
            shards.write_manifest()
        towers.eval()
        towers.vision_tower.to(towers.device if device is None else device)
        reader = ClipReader(processor, choice)
        _compute(shards, agreed[0][state.process_index :: state.num_processes], rows, towers, reader, num_workers)
        state.wait_for_everyone()
    return _joined(rows, CachedFeatures(shards), choice)


def _joined(rows: datasets.Dataset, features: CachedFeatures, choice: FeatureChoice) -> datasets.Dataset:
    """Return the rows of clips that could be opened, with their features in place of the media that they replace."""
    opened = features.frames.nonzero().flatten()
    if len(opened) == 0:
        for shard in range(len(features.shards)):
            features.shards.path(shard).unlink(missing_ok=True)
        raise ValueError(f"none of {len(rows)} clips can be opened; `dali-llava inspect --check 100` shows why.")
    kept = ["id"] if choice.sounds else ["id", "audio", "start", "end"]
    joined = rows.select_columns(kept).add_column("clip", list(range(len(rows))))
    if len(opened) < len(rows):
        logger.warning(
            "%s: %d of %d clips could not be opened and are left out",
            features.shards.folder,
            len(rows) - len(opened),
            len(rows),
        )
        joined = joined.select(opened.tolist())
    return joined.with_transform(features)


def _compute(
    shards: FeatureShards,
    missing: list[int],
    rows: datasets.Dataset,
    towers: LlavaAudioTowers | LlavaAudioModel,
    reader: ClipReader,
    num_workers: int,
) -> None:
    """Compute and write the shards `missing`."""
    step = max(1, int(IMAGES_AT_ONCE // _frames_per_clip(rows, reader.choice)))
    chunks = []  # indices of clips to open at once, all of one shard
    for clips in map(shards.clips_of, missing):
        chunks += [list(clips[start : start + step]) for start in range(0, len(clips), step)]
    media = rows.select_columns(["id", "audio", "frames", "start", "end"])
    # A generator of its own: whether features are computed or found does not change the numbers that training draws.
    loader = DataLoader(
        media, batch_sampler=chunks, collate_fn=reader, num_workers=num_workers, generator=torch.Generator()
    )
    bar = tqdm(
        total=sum(map(len, chunks)),
        desc="features",
        unit="clip",
        delay=2,
        disable=None if PartialState().is_main_process else True,
    )
    done, in_a_row = [], 0
    with bar:
        for indices, batch in zip(chunks, loader, strict=True):
            for error in batch["errors"]:
                in_a_row = 0 if error is None else in_a_row + 1
                if error is not None:
                    logger.warning("%s; the clip is skipped", error)
                if in_a_row == MOST_IN_A_ROW:
                    raise MediaError(f"{in_a_row} consecutive clips cannot be opened; last error: {error}")
            done += _features(batch, towers, reader.choice.dtype)
            shard = indices[0] // shards.clips_per_shard
            if indices[-1] == shards.clips_of(shard)[-1]:
                shards.write(shard, done)
                done = []
            bar.update(len(indices))


def _features(
    batch: Mapping[str, Any], towers: LlavaAudioTowers | LlavaAudioModel, dtype: torch.dtype
) -> list[dict[str, torch.Tensor] | None]:
    """Return the features of each clip of a `ClipReader`'s batch, None for a clip that could not be opened."""
    if "pixel_values" not in batch:
        return [None] * len(batch["frames"])
    with torch.no_grad():
        encoded = [
            towers.encode_image(images.to(towers.vision_tower.device)).to("cpu", dtype)
            for images in batch["pixel_values"].split(IMAGES_AT_ONCE)
        ]
    tokens = iter(torch.cat(encoded).split([count for count in batch["frames"] if count]))
    sounds = iter(batch.get(SOUNDS, ()))
    return [
        ({TOKENS: next(tokens)} | ({SOUNDS: next(sounds)} if SOUNDS in batch else {})) if count else None
        for count in batch["frames"]
    ]


def _clip_bytes(
    rows: datasets.Dataset,
    towers: LlavaAudioTowers | LlavaAudioModel,
    processor: LlavaAudioProcessor,
    choice: FeatureChoice,
) -> float:
    """Return the size of a clip's features in bytes."""
    config, extractor = towers.config, processor.feature_extractor
    frame = config.image_seq_length * config.audio_config.output_size * choice.dtype.itemsize
    sound = extractor.max_length * extractor.num_mel_bins * 4 if choice.sounds else 0
    return _frames_per_clip(rows, choice) * frame + sound


def _frames_per_clip(rows: datasets.Dataset, choice: FeatureChoice) -> float:
    """Return the maximum number of stored frames per clip; an estimate from the first clips if all are stored."""
    if choice.frame is not None or choice.frames is not None:
        return choice.frames if choice.frame is None else 1
    counts = []
    for row in rows.select_columns(["id", "frames", "start", "end"]).select(range(min(COUNTED_FIRST, len(rows)))):
        with suppress(MediaError):
            counts.append(count_frames(row))
    return sum(counts) / len(counts) if counts else 1


def _check_space(shards: FeatureShards, needed: int) -> None:
    """Print the size of the features to compute. Raises a ValueError if the disk is too small."""
    free = shutil.disk_usage(shards.folder).free
    if needed > free:
        raise ValueError(
            f"feature_cache {shards.folder}: the features of {shards.clips} clips need {_size(needed)}, but "
            f"{_size(free)} are free; give a folder on a larger disk, --feature_cache DIR, or store fewer frames or "
            "clips, --cache_frames N, --max_samples N."
        )
    if PartialState().is_main_process:
        print(
            f"{shards.folder}: computing the features of {shards.clips} clips, {_size(needed)} ({_size(free)} free)",
            file=sys.stderr,
        )


def _size(count: float) -> str:
    """Return a number of bytes in words, such as `0.59 TB`."""
    power = min(4, max(1, (len(str(int(10 * count))) - 1) // 3))  # 0.1 to 100 of the unit
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _shards(
    rows: datasets.Dataset,
    towers: LlavaAudioTowers | LlavaAudioModel,
    processor: LlavaAudioProcessor,
    choice: FeatureChoice,
    folder: str | os.PathLike | None,
) -> FeatureShards:
    """Return the shards of the features, which may be missing."""
    per_shard = max(1, min(SHARD_CLIPS, int(SHARD_BYTES // _clip_bytes(rows, towers, processor, choice))))
    parts = _parts(rows, towers, processor, choice) | {"clips_per_shard": per_shard}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    default = Path(datasets.config.HF_DATASETS_CACHE) / "dali_llava_features" / key
    return FeatureShards(default if folder is None else Path(folder), parts, len(rows), per_shard, key)


def _parts(
    rows: datasets.Dataset,
    towers: LlavaAudioTowers | LlavaAudioModel,
    processor: LlavaAudioProcessor,
    choice: FeatureChoice,
) -> dict[str, Any]:
    """Return everything that the features depend on. It is the same in all processes, unlike a pickled model."""
    config, images, extractor = towers.config, processor.image_processor, processor.feature_extractor
    parts = {
        "format": FORMAT,
        "clips": f"{rows._fingerprint} {_media_digest(rows)}",
        "vision_tower": _weights_digest(towers.vision_tower),
        "vision_layer": [config.vision_feature_layer, config.vision_feature_select_strategy],
        "image_processor": _digest(images.to_json_string(), str(processor.pad_to_square)),
        "frames": choice.frames if choice.frame is None else f"index {choice.frame}",
        "dtype": str(choice.dtype),
    }
    if choice.sounds:
        parts["feature_extractor"] = _digest(extractor.to_json_string(), inspect.getsource(type(extractor)))
    return parts


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _weights_digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _media_digest(rows: datasets.Dataset) -> str:
    """Return a hash of the size of each clip's first picture or video; a fingerprint contains only their paths."""
    digest, sizes = hashlib.sha256(), {}
    for batch in rows.select_columns(["frames"]).with_format("arrow").iter(1000):
        for lists in batch["frames"].chunks:
            paths, first = lists.flatten().field("path"), 0  # without a copy of embedded bytes
            for length in lists.value_lengths().to_pylist():
                file = file_of(paths[first].as_py() or "") if length else ""
                first += length or 0
                if file not in sizes:
                    sizes[file] = -1
                    with suppress(OSError):
                        sizes[file] = os.path.getsize(file)
                digest.update(f"{sizes[file]} ".encode())
    return digest.hexdigest()
