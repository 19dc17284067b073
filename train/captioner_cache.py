"""The pretrained captioner, trained once and kept under a hash of everything it depends on."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

from dali_llava.processing.corpora.avworld.avworld import content_hash

from . import pretrain_captioner


CACHE = "DALI_LLAVA_CACHE"


def cache_folder() -> Path:
    """`$DALI_LLAVA_CACHE`, or `dali_llava` in the user's cache folder."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dali_llava"


def captioner_key(config: Path, overrides: list[str]) -> str:
    """A hash of configuration, overrides, AVWorld, the code that trains, and the libraries' versions."""
    digest = hashlib.sha256()
    versions = [torch.__version__, transformers.__version__, str(torch.get_num_threads())]
    for part in (config.read_text(), *overrides, content_hash(), *versions):
        digest.update(part.encode() + b"\0")
    root = Path(__file__).parent.parent
    modules = [root / "train" / name for name in ("pretrain_captioner.py", "clips.py", "collators.py", "corpus.py")]
    modules += [root / "train" / "trainers" / name for name in ("captioning.py", "stage.py", "words.py")]
    names = ("processing_llava_audio.py", "feature_extraction_llava_audio.py", "media.py", "corpora/rows.py")
    modules += [root / "processing" / name for name in names]
    for path in (*modules, *sorted(root.glob("modeling/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def pretrained_captioner(config: Path, overrides: list[str] | None = None) -> Path:
    """
    Folder of the captioner that `config` describes, trained now if the cache does not hold it.

    Args:
        config: YAML of `pretrain_captioner`.
        overrides: `--field value` words that change it.

    Returns:
        a folder in the cache, for reading; it is put there whole, so that a run cut short leaves nothing behind.
    """
    overrides = overrides or []
    folder = cache_folder() / f"captioner-{captioner_key(config, overrides)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".captioner-") as unfinished:
            output = Path(unfinished) / "captioner"
            pretrain_captioner.main([str(config), *overrides, "--output_dir", str(output)])
            try:
                os.replace(output, folder)
            except OSError:  # another process was first; its captioner is the same
                shutil.rmtree(output)
    return folder
