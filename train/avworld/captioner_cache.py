"""Cache of the pretrained captioner, keyed by a hash of everything it depends on."""

import ast
import hashlib
import os
import shutil
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path

import torch
import transformers

from dali_llava.processing.corpora.avworld.avworld import content_hash
from dali_llava.train.avworld import pretrain_captioner


CACHE = "DALI_LLAVA_CACHE"


def cache_folder() -> Path:
    """Return `$DALI_LLAVA_CACHE`, or `dali_llava` in the user's cache folder."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dali_llava"


def imported_sources(module: str, package: str = "dali_llava") -> list[Path]:
    """
    Return the source files of `package` that `module` imports directly or indirectly, and its own, sorted by module.

    Imports are parsed from the source, so that the list does not depend on the modules that the process has imported.
    """
    files, pending = {}, [module]
    while pending:
        name = pending.pop()
        # A name is a module or an attribute of its parent module.
        if name in files or not name.startswith(package) or (spec := _find_spec(name)) is None:
            continue
        files[name] = Path(spec.origin)
        parent = name if spec.submodule_search_locations else name.rpartition(".")[0]
        pending.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(files[name].read_text())):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), parent) if node.level else node.module
                pending += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return [files[name] for name in sorted(files)]


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ModuleNotFoundError:  # an attribute of a module that is not a package
        return None


def captioner_key(config: Path, overrides: list[str]) -> str:
    """Return a hash of the configuration, the overrides, AVWorld, the training code and the library versions."""
    digest = hashlib.sha256()
    versions = [torch.__version__, transformers.__version__, str(torch.get_num_threads())]
    for part in (config.read_text(), *overrides, content_hash(), *versions):
        digest.update(part.encode() + b"\0")
    for path in imported_sources(pretrain_captioner.__name__):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def pretrained_captioner(config: Path, overrides: list[str] | None = None) -> Path:
    """
    Return the folder of the captioner that `config` describes. The captioner is trained if it is not cached.

    Args:
        config: YAML configuration of `pretrain_captioner`.
        overrides: `--field value` words that override the configuration.

    Returns:
        a read-only folder in the cache. It is created atomically, so that an interrupted run leaves nothing behind.
    """
    overrides = overrides or []
    folder = cache_folder() / f"captioner-{captioner_key(config, overrides)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".captioner-") as unfinished:
            output = Path(unfinished) / "captioner"
            words = ["--output_dir", str(output), "--report_to", "none"]
            pretrain_captioner.main([str(config), *overrides, *words])
            try:
                os.replace(output, folder)
            except OSError:  # another process has cached the same captioner
                shutil.rmtree(output)
    return folder
