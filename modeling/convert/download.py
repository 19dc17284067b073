"""Sources on the Hub: only the files that a conversion needs are downloaded."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..loading import reach_hub
from .sources import PICKLED


SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
WEIGHT_ENDINGS = (".safetensors", *PICKLED, ".gguf")


def find_source(name_or_path: str | os.PathLike) -> Path:
    """
    The file or folder of released weights. A model on the Hub is downloaded: its safetensors files, or its pickled
    files if it has no others.

    Raises:
        FileNotFoundError: there is no such file, folder, or model on the Hub.
        ConnectionError: the Hub cannot be reached, and the model is not in the cache.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    if path.suffix in WEIGHT_ENDINGS:
        raise FileNotFoundError(f"{path}: no such file; check the path")
    name = str(name_or_path)
    options = reach_hub(name, {})
    if options.get("local_files_only"):
        return Path(snapshot_download(name, local_files_only=True))
    files = HfApi().list_repo_files(name)
    endings = (".safetensors",) if any(file.endswith(".safetensors") for file in files) else PICKLED
    return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *(f"*{ending}" for ending in endings)]))


__all__ = ["find_source"]
