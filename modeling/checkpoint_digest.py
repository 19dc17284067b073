"""A hash of a checkpoint's files, which identifies its weights before they are loaded."""

import hashlib
import json
import os

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME, cached_file

from .loading import OPTIONAL, Checkpoint


PROCESSOR_FILES = (
    PROCESSOR_NAME,
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
)
BLOCK = 2**16  # bytes that are read at a time
BLOCKS = 16  # number of blocks that are read of a large tensor


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """
    A hash of the weights, the configuration and the processor of a checkpoint, with its stages and its base model.

    The names of folders have no effect. Tensors of at most 1 MiB are read whole, and larger ones in 16 evenly spaced
    blocks of 64 KiB, which is less than 1 GB of a 7B model. A training step changes values in all blocks of a tensor,
    but an edit of a few values may not be seen.

    Raises:
        OSError: a file is missing.
        ValueError: a safetensors file is damaged.
    """
    digest = hashlib.sha256()
    small = [(checkpoint.source, checkpoint.hub_kwargs, CONFIG_NAME), (*checkpoint.base, GENERATION_CONFIG_NAME)]
    small += [(*checkpoint.processor, name) for name in PROCESSOR_FILES]
    for source, hub_kwargs, name in small:
        path = cached_file(source, name, **OPTIONAL, **hub_kwargs)
        if path is not None:
            with open(path, "rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    for path in checkpoint.weight_files:
        digest.update(_weights_digest(path))
    return digest.hexdigest()


def _weights_digest(path: str | os.PathLike) -> bytes:
    """A hash of the header and of blocks of the tensors of a safetensors file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, os.path.getsize(path)))
        digest.update(header)
        try:
            tensors = json.loads(header)
            spans = sorted(entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or save the model again.") from error
        for begin, end in spans:
            if end - begin <= BLOCK * BLOCKS:
                starts, size = [begin], end - begin
            else:
                starts, size = [begin + (end - begin - BLOCK) * k // (BLOCKS - 1) for k in range(BLOCKS)], BLOCK
            for start in starts:
                file.seek(8 + length + start)
                digest.update(file.read(size))
    return digest.digest()


__all__ = ["checkpoint_digest"]
