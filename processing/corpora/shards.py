"""What `dali-llava prepare` has made, as a corpus: clips in tar archives, streamed or opened where they lie."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.utils.file_utils import xjoin, xopen

from . import members
from .builder import FEATURES
from .options import option


ANY_SPLIT = "train"  # what any folder of shards answers to; it also knows the split that it was made of
INDEX_FILE = "index.json"


@dataclass
class ShardsConfig(datasets.BuilderConfig):
    """
    Options of the corpus `shards`.

    Args:
        data_dir: a folder that `dali-llava prepare` has filled; to stream, also a URL that fsspec knows (`hf://`,
            `s3://`, `memory://`, ...).
        storage_options: of the URL's file system.
        splits: the split of which the shards were made, as `index.json` records it, or `train`, which all shards
            answer to.

    Raises:
        ValueError: several splits, no `data_dir`, or a folder from which every clip was left out.
        FileNotFoundError: no index.json: there is no such folder, or its run has not finished.
    """

    name: str = "shards"
    splits: Sequence[str] = (ANY_SPLIT,)
    data_dir: str | None = option(
        "folder of the shards, or its URL", metavar="DIR", required=True, example="shards/audiocaps"
    )
    storage_options: dict[str, Any] = option("options of the URL's file system", default={}, metavar="JSON")

    def __post_init__(self):
        super().__post_init__()
        self.splits = (self.splits,) if isinstance(self.splits, str) else tuple(self.splits)
        if len(self.splits) != 1:
            raise ValueError(f"shards are one split, not {len(self.splits)}: {', '.join(self.splits)}")
        if self.data_dir is not None:
            self.data_dir = os.fspath(self.data_dir).removeprefix("file://")
            if "://" not in self.data_dir:
                self.data_dir = os.path.abspath(os.path.expanduser(self.data_dir))

    @classmethod
    def find_splits(cls, **options: Any) -> tuple[str, ...]:
        """The split that the shards were made of, and `train`."""
        corpus = json.loads(cls(**options).read_index()).get("settings", {}).get("corpus") or ""
        recorded = re.fullmatch(r"[^/]+/(\w+)", corpus)  # `dali-llava prepare` writes CORPUS/SPLIT
        return (ANY_SPLIT,) if recorded is None else tuple(dict.fromkeys((recorded[1], ANY_SPLIT)))

    def read_index(self) -> bytes:
        """The content of `index.json`."""
        if self.data_dir is None:
            raise ValueError("shards needs data_dir=, a folder that `dali-llava prepare` has filled")
        url = xjoin(self.data_dir, INDEX_FILE)
        try:
            with xopen(url, "rb", download_config=self.download_config) as file:
                content = file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url}: no such file, or out of reach; `dali-llava prepare` writes it when all shards are complete"
            ) from error
        try:
            is_empty = not json.loads(content)["shards"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{url}: is not an index of shards; run `dali-llava prepare` again") from error
        if is_empty:
            raise ValueError(f"{url}: lists no shards; report.csv has the reason why every clip was left out")
        return content

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Read the index into `index`, and return the cache key, which depends on it: it has the digests of all
        shards."""
        content = self.read_index()
        self.index = json.loads(content)
        digest = hashlib.sha256(f"{self.data_dir}\0{self.splits[0]}\0{custom_features or ''}\0".encode() + content)
        for path in (__file__, members.__file__):
            digest.update(Path(path).read_bytes())
        return f"{self.name}-{digest.hexdigest()[:16]}"

    @property
    def download_config(self) -> datasets.DownloadConfig:
        return datasets.DownloadConfig(storage_options=self.storage_options)


class Shards(datasets.GeneratorBasedBuilder):
    """
    The clips of a folder of shards.

    A stream reads the archives one after another, and its rows hold the bytes of sound (FLAC, 16 kHz mono) and frames
    (JPEG). Otherwise the archives stay where they are and rows hold the places of their files in them, so that clips
    are read in any order and no copy is made.
    """

    BUILDER_CONFIG_CLASS = ShardsConfig
    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Prepared clips in tar archives.", features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config, streamed = self.config, dl_manager.is_streaming
        urls = [xjoin(config.data_dir, shard["name"]) for shard in config.index["shards"]]
        if not streamed:
            if "://" in config.data_dir:
                raise ValueError(f"{config.data_dir}: is not on a disk; pass streaming=True, or copy the folder")
            for url, shard in zip(urls, config.index["shards"], strict=True):
                size = os.path.getsize(url) if os.path.exists(url) else 0
                if size != shard["bytes"]:
                    raise _damaged(url, f"{size} bytes of {shard['bytes']}")
        # A list among the arguments is what `datasets` divides among processes, ranks and workers.
        kwargs = {"urls": urls, "streamed": streamed, "download_config": config.download_config}
        return [datasets.SplitGenerator(config.splits[0], gen_kwargs=kwargs)]

    def _generate_examples(
        self, urls: list[str], streamed: bool, download_config: datasets.DownloadConfig
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for url in urls:
            try:
                with (
                    xopen(url, "rb", download_config=download_config) as file,
                    tarfile.open(fileobj=file, mode="r|" if streamed else "r:") as tar,
                ):
                    for row in _rows(tar, None if streamed else url):
                        yield row["id"], row
            except tarfile.TarError as error:
                raise _damaged(url, error) from error


def _damaged(url: str, what: object) -> ValueError:
    return ValueError(f"{url}: is damaged ({what}); copy it again, or delete it and prepare again")


def _rows(tar: tarfile.TarFile, archive: str | None) -> Iterator[dict[str, Any]]:
    """The rows of an archive: its files' bytes, or their places in `archive`. A clip's files lie together, the JSON
    last."""
    audio, frames = None, []
    for member in tar:
        if member.name.endswith(".json"):
            yield {**json.loads(_content(tar, member)), "audio": audio, "frames": frames}
            audio, frames = None, []
            continue
        if archive is None:
            media = {"path": member.name, "bytes": _content(tar, member)}
        else:
            media = {"path": members.member_path(archive, member), "bytes": None}
        if member.name.endswith(".flac"):
            audio = media
        else:
            frames.append(media)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member).read()
    if len(content) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content
