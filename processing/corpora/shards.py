"""The output of `dali-llava prepare` as a corpus: clips in tar archives, streamed or read in place."""

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


ANY_SPLIT = "train"  # supported by every folder of shards, besides the split that the shards were prepared from
INDEX_FILE = "index.json"


@dataclass
class ShardsConfig(datasets.BuilderConfig):
    """
    Options of the corpus `shards`.

    Args:
        data_dir: the output folder of `dali-llava prepare`; for streaming, also a URL that fsspec supports (`hf://`,
            `s3://`, `memory://`, ...).
        storage_options: options of the URL's file system.
        splits: the split that the shards were prepared from, as recorded in `index.json`, or `train`, which all shards
            support.

    Raises:
        ValueError: more than one split, no `data_dir`, or a folder without shards because all clips were skipped.
        FileNotFoundError: no `index.json`, because the folder does not exist or its preparation has not finished.
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
        """The split that the shards were prepared from, and `train`."""
        corpus = json.loads(cls(**options).read_index()).get("settings", {}).get("corpus") or ""
        recorded = re.fullmatch(r"[^/]+/(\w+)", corpus)  # `dali-llava prepare` writes CORPUS/SPLIT
        return (ANY_SPLIT,) if recorded is None else tuple(dict.fromkeys((recorded[1], ANY_SPLIT)))

    def read_index(self) -> bytes:
        """The content of `index.json`."""
        if self.data_dir is None:
            raise ValueError("shards needs data_dir=, the output folder of `dali-llava prepare`")
        url = xjoin(self.data_dir, INDEX_FILE)
        try:
            with xopen(url, "rb", download_config=self.download_config) as file:
                content = file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url}: no such file, or not reachable; `dali-llava prepare` writes it when all shards are complete"
            ) from error
        try:
            is_empty = not json.loads(content)["shards"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{url}: is not an index of shards; run `dali-llava prepare` again") from error
        if is_empty:
            raise ValueError(f"{url}: lists no shards because all clips were skipped; see the reasons in report.csv")
        return content

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Read the index into `index` and return the cache key, which depends on the digests of all shards in it."""
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

    With streaming, the archives are read one after another, and rows contain the bytes of the sound (FLAC, 16 kHz
    mono) and the frames (JPEG). Without streaming, rows contain the positions of the files in the archives, so clips
    can be read in any order without a copy.
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
                raise ValueError(
                    f"{config.data_dir}: is not a local folder; pass streaming=True, or copy it to a disk"
                )
            for url, shard in zip(urls, config.index["shards"], strict=True):
                size = os.path.getsize(url) if os.path.exists(url) else 0
                if size != shard["bytes"]:
                    raise _damaged(url, f"{size} bytes of {shard['bytes']}")
        # `datasets` divides the list in these arguments among processes, ranks and workers.
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
    """
    The rows of an archive, with the bytes of its files, or with their paths in `archive`.

    The files of a clip are adjacent, and its JSON file is the last.
    """
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
