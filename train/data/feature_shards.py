"""Features of clips in safetensors shards, which are checked when they are opened and when they are read."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dali_llava.atomic import atomic_path, write_text


MANIFEST = "manifest.json"
TOKENS, SOUNDS = "image_tokens", "input_features"


def damaged(path: Path, reason: object) -> ValueError:
    """Return the error for a shard that cannot be used."""
    return ValueError(f"{path}: is damaged ({reason}); delete it, and the next run computes it again.")


def checksum(features: Mapping[str, torch.Tensor]) -> int:
    """Return the CRC-32 of the bytes of the tensors of one clip, in the order of their names."""
    value = 0
    for name in sorted(features):
        value = zlib.crc32(features[name].contiguous().view(torch.uint8).numpy(), value)
    return value


@dataclass(frozen=True)
class FeatureShards:
    """
    A folder with the features of clips, `clips_per_shard` consecutive clips a file.

    A shard is either absent or whole. It contains `image_tokens` (all frames of its clips, N, width), optionally
    `input_features` (clips, T, mels), the number of `frames` of each clip (0 for a clip that cannot be opened), and
    the `checksums` of each clip.

    Args:
        folder: the folder.
        parts: everything that the features depend on, by name. Values are strings and numbers.
        clips: number of clips.
        clips_per_shard: number of clips in all shards but the last.
        key: hash of `parts`, which is stored in each shard.
    """

    folder: Path
    parts: dict[str, Any] = field(repr=False)
    clips: int
    clips_per_shard: int
    key: str

    def __len__(self) -> int:
        return -(-self.clips // self.clips_per_shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def clips_of(self, shard: int) -> range:
        """Return the indices of the clips of a shard."""
        start = shard * self.clips_per_shard
        return range(start, min(start + self.clips_per_shard, self.clips))

    def missing(self) -> list[int]:
        """
        Return the shards that are not in the folder.

        Raises:
            ValueError: if the folder contains the features of other clips or models, or a damaged shard.
        """
        self._check_manifest()
        return [shard for shard in range(len(self)) if not self.path(shard).exists() or not self.summary(shard)]

    def write_manifest(self) -> None:
        """Write `manifest.json`, which describes what the shards depend on."""
        write_text(self.folder / MANIFEST, json.dumps(self.parts, indent=2) + "\n")

    def write(self, shard: int, clips: Sequence[Mapping[str, torch.Tensor] | None]) -> None:
        """
        Write a shard, whole or not at all.

        Args:
            shard: index of the shard.
            clips: the features of each clip: `image_tokens` (frames, N, width) and optionally `input_features`
                (T, mels). None for a clip that cannot be opened.
        """
        opened = [clip for clip in clips if clip is not None]
        tensors = {
            "frames": torch.tensor([0 if clip is None else len(clip[TOKENS]) for clip in clips]),
            "checksums": torch.tensor([0 if clip is None else checksum(clip) for clip in clips]),
        }
        if opened:
            tensors[TOKENS] = torch.cat([clip[TOKENS] for clip in opened])
        if opened and SOUNDS in opened[0]:
            silence = torch.zeros_like(opened[0][SOUNDS])
            tensors[SOUNDS] = torch.stack([silence if clip is None else clip[SOUNDS] for clip in clips])
        with atomic_path(self.path(shard), tag=f".{os.getpid()}") as temporary:
            save_file(tensors, temporary, metadata={"key": self.key})

    def summary(self, shard: int) -> dict[str, torch.Tensor]:
        """
        Return `frames` and `checksums` (clips,) of a shard, after a check of its header and size.

        Raises:
            ValueError: if the shard is damaged, or contains the features of other clips or models.
        """
        path, count = self.path(shard), len(self.clips_of(shard))
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise ValueError(
                        f"{path}: contains the features of other clips or models; give another folder, "
                        f"--feature_cache DIR, or delete {self.folder}."
                    )
                found = {name: file.get_tensor(name) for name in ("frames", "checksums")}
                total = file.get_slice(TOKENS).get_shape()[0] if TOKENS in file.keys() else 0
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: does not exist; processes on several machines need a shared folder, --feature_cache DIR."
            ) from error
        except (SafetensorError, OSError) as error:
            raise damaged(path, " ".join(str(error).split())) from error
        if any(len(values) != count for values in found.values()) or int(found["frames"].sum()) != total:
            raise damaged(path, f"it does not contain {count} clips")
        return found

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            return
        try:
            parts = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is damaged ({error}); delete {self.folder}.") from error
        others = [name for name in self.parts if parts.get(name) != self.parts[name]]
        if others:
            raise ValueError(
                f"{self.folder}: contains features of other settings (different: {', '.join(others)}); give another "
                "folder, --feature_cache DIR, or delete this one."
            )


class CachedFeatures:
    """
    Reads the features of clips from shards. A transform of a `datasets.Dataset` with the indices in a column `clip`.

    Files are memory-mapped for each read and not kept open, so that DataLoader workers need no setup.

    Args:
        shards: shards, none of which is missing.

    Attributes:
        frames: (clips,), number of frames of each clip, 0 for a clip that could not be opened.

    Raises:
        ValueError: as in `FeatureShards.summary`, or if a shard is missing.
    """

    def __init__(self, shards: FeatureShards):
        summaries = [shards.summary(shard) for shard in range(len(shards))]
        self.shards = shards
        self.frames, self.checksums = (torch.cat([each[name] for each in summaries]) for name in summaries[0])
        # position of each clip's first frame in its shard
        self.starts = torch.cat([each["frames"].cumsum(0) - each["frames"] for each in summaries])

    def read(self, clip: int) -> dict[str, torch.Tensor]:
        """
        Return `image_tokens` (frames, N, width) of a clip, and `input_features` (T, mels) if they are stored.

        Raises:
            ValueError: if the bytes of the clip differ from those that were written.
        """
        shard, place = divmod(clip, self.shards.clips_per_shard)
        start, path = int(self.starts[clip]), self.shards.path(shard)
        try:
            with safe_open(path, "pt") as file:
                # copies: a view of the file would change with it after the check
                features = {TOKENS: file.get_slice(TOKENS)[start : start + int(self.frames[clip])].clone()}
                if SOUNDS in file.keys():
                    features[SOUNDS] = file.get_slice(SOUNDS)[place].clone()
        except (SafetensorError, OSError) as error:
            raise damaged(path, " ".join(str(error).split())) from error
        if checksum(features) != int(self.checksums[clip]):
            raise damaged(path, f"the checksum of clip {clip} does not match")
        return features

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Replace the column `clip` by the features of the clips."""
        if "clip" not in batch:  # single columns are also transformed
            return batch
        features = [self.read(clip) for clip in batch["clip"]]
        columns = {name: values for name, values in batch.items() if name != "clip"}
        return columns | {name: [each[name] for each in features] for name in features[0]}
