"""Shards back into rows, streamed from a folder or through fsspec."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.utils.file_utils import xjoin, xopen

from ..corpora.listing import FEATURES
from .report import INDEX_FILE


def stream_shards(
    folder: str | os.PathLike, storage_options: dict[str, Any] | None = None
) -> datasets.IterableDataset:
    """
    The clips of a folder that `dali-llava prepare` has filled, as rows that are read while they are used.

    Shards are divided among the ranks of `split_dataset_by_node` and the workers of a `DataLoader`, and each clip
    comes once. There should be as many shards as ranks times workers, and best a multiple of it.

    Args:
        folder: a path or a URL that fsspec knows (`hf://`, `s3://`, `memory://`, ...).
        storage_options: of the URL's file system.

    Returns:
        rows as `load_corpus` gives them; `audio` holds the clip's FLAC bytes, 16 kHz mono, and `frames` JPEG bytes.

    Raises:
        FileNotFoundError: no index.json: the folder is not there, or its run has not finished.
        ValueError: while reading, a damaged shard.
    """
    folder = os.fspath(folder)
    url = xjoin(folder, INDEX_FILE)
    config = datasets.DownloadConfig(storage_options=storage_options or {})
    try:
        with xopen(url, "rb", download_config=config) as file:
            index = json.load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url}: no such file; `dali-llava prepare` writes it when all shards are there"
        ) from error
    urls = [xjoin(folder, shard["name"]) for shard in index["shards"]]
    if not urls:
        raise ValueError(f"{url}: lists no shards; every clip was left out, and report.csv tells why")
    # A list among the arguments is what `datasets` divides among ranks and workers.
    return datasets.IterableDataset.from_generator(
        read_shards, features=FEATURES, gen_kwargs={"urls": urls, "download_config": config}
    )


def read_shards(urls: list[str], download_config: datasets.DownloadConfig) -> Iterator[dict[str, Any]]:
    """The rows of some shards, one after another."""
    for url in urls:
        try:
            with (
                xopen(url, "rb", download_config=download_config) as file,
                tarfile.open(fileobj=file, mode="r|") as tar,
            ):
                yield from _rows(tar)
        except tarfile.TarError as error:
            raise ValueError(f"{url}: is damaged ({error}); copy it again, or delete it and prepare again") from error


def _rows(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """A clip's files lie together, the JSON last."""
    audio, frames = None, []
    for member in tar:
        content = tar.extractfile(member).read()
        if len(content) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        if member.name.endswith(".flac"):
            audio = {"path": member.name, "bytes": content}
        elif member.name.endswith(".jpg"):
            frames.append({"path": member.name, "bytes": content})
        else:
            yield {**json.loads(content), "audio": audio, "frames": frames}
            audio, frames = None, []
