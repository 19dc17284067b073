"""Reading the tensors of released weights: safetensors or pickled files, single or sharded, without executing code."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


PICKLED = (".bin", ".pt", ".pth")
# Files of a folder in the order of preference.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
WRAPPERS = ("model", "state_dict")  # keys under which training programs save the weights
DISTRIBUTED_PREFIX = "module."  # of the weights of `DistributedDataParallel`


class Source:
    """
    The named tensors of one or several files. Tensors are memory-mapped: a tensor is read from disk when it is used.

    Attributes:
        path: the file or folder that was opened.
        files: the files that contain the tensors.
    """

    def __init__(self, path: Path, files: Mapping[Path, Mapping[str, torch.Tensor]]):
        self.path, self.files = path, list(files)
        self._tensors: dict[str, torch.Tensor] = {}
        owners: dict[str, Path] = {}
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                if name in owners:
                    raise ValueError(f"{file}: {name} is also in {owners[name].name}; copy the weights again")
                owners[name], self._tensors[name] = file, tensor
        if self._tensors and all(name.startswith(DISTRIBUTED_PREFIX) for name in self._tensors):
            self._tensors = {name.removeprefix(DISTRIBUTED_PREFIX): each for name, each in self._tensors.items()}

    def names(self) -> list[str]:
        """Names of the tensors, in the order of the files."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. It shares memory with the file; do not modify it."""
        return self._tensors[name]


def open_source(path: str | os.PathLike) -> Source:
    """
    Open the weights in a file or a folder.

    A wrapper around the weights (`{"model": {...}}` or `{"state_dict": {...}}`) and a prefix `module.` of all names
    are removed.

    Args:
        path: a `.safetensors`, `.bin`, `.pt` or `.pth` file, or a folder that contains `model.safetensors` or
            `pytorch_model.bin`, single or in shards with an index.

    Raises:
        FileNotFoundError: the file, a shard, or the weights in the folder are missing.
        ValueError: a file is damaged, contains other objects than tensors, or does not match its index; or two files
            contain the same tensor. The message contains the file.
    """
    path = Path(path)
    if path.is_dir():
        return Source(path, _read_folder(path))
    if path.is_file():
        return Source(path, {path: _read_file(path)})
    raise FileNotFoundError(f"{path}: no such file or folder; check the path")


def _read_folder(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    """The tensors of each weight file of a folder."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: no weights in it; expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return {found: _read_file(found)}
    try:
        weight_map = {name: folder / file for name, file in json.loads(found.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found}: not an index of weights ({error!r}); copy it again from its source") from error
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: the shard is missing; copy or download the whole folder again")
    stored = {shard: _read_file(shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in stored[shard]:
            raise ValueError(f"{shard}: has no {name}, which {found.name} expects in it; copy both again")
    return stored


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in PICKLED:
        return _read_pickled(file)
    raise ValueError(f"{file}: unknown kind of weights; give a .safetensors, {', '.join(PICKLED)} file or a folder")


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); copy or download it again") from error


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Only files in the zip format, which torch writes since version 1.6, can be memory-mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w+\.[\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{file}: damaged or not saved by torch; copy or download it again") from error
        raise ValueError(
            f"{file}: contains {found[1]}, which is not a tensor and could run code, so the file is not "
            "loaded; save its tensors alone to another file where you trust it"
        ) from error
    except Exception as error:  # the unpickler raises many types of errors for a damaged file
        raise ValueError(f"{file}: damaged or not saved by torch; copy or download it again") from error
    tensors = _unwrap(loaded)
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{file}: contains no named tensors; give the file of a state dict")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor; give a state dict")
    return dict(tensors)


def _unwrap(loaded):
    """The state dict in a checkpoint of a training program."""
    while isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


__all__ = ["Source", "open_source"]
