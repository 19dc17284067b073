"""Writing safetensors files one tensor at a time, so that a large model needs the memory of a single tensor."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .rules import LazyTensor


MAX_SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 1 << 26
# Names of dtypes in the header of a safetensors file.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """
    Write `model.safetensors`, or shards with an index, as `save_pretrained` names them.

    Args:
        folder: an existing folder.
        tensors: the tensors by name. Each one is read when it is written.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.

    Raises:
        OSError: the disk is too small. Nothing is written.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_space(folder, total)
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for number, shard in enumerate(shards, start=1):
            file = SAFE_WEIGHTS_NAME
            if len(shards) > 1:
                file = file.replace(".", f"-{number:05d}-of-{len(shards):05d}.")
            _write_file(folder / file, shard, bar)
            weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_space(folder: Path, size: int) -> None:
    """
    Check that the disk of `folder` has room for `size` bytes.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{folder}: the weights need {size / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; free some "
            "space, or choose another disk"
        )


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], bar: tqdm) -> None:
    # Wide dtypes first, so that each tensor is aligned in the file.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, lazy in tensors.items():
            tensor = lazy.read()
            if (tensor.shape, tensor.dtype) != (lazy.shape, lazy.dtype):
                raise ValueError(f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, not as announced")
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), CHUNK_BYTES):
                chunk = flat[start : start + CHUNK_BYTES]
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


__all__ = ["MAX_SHARD_BYTES", "check_space", "write_weights"]
