"""The pretrained captioner, trained once and kept under a hash of everything it depends on."""

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
    """`$DALI_LLAVA_CACHE`, or `dali_llava` in the user's cache folder."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dali_llava"


def imported_sources(module: str, package: str = "dali_llava") -> list[Path]:
    """The source files of `package` that `module` imports, directly or not, its own among them, in a fixed order.

    Imports are read from the source, so that the list does not depend on what else the process has imported.
    """
    files, pending = {}, [module]
    while pending:
        name = pending.pop()
        # A name is a module, or an attribute of the package before it.
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
    except ModuleNotFoundError:  # an attribute of a module that is no package
        return None


def captioner_key(config: Path, overrides: list[str]) -> str:
    """A hash of configuration, overrides, AVWorld, the code that trains, and the libraries' versions."""
    digest = hashlib.sha256()
    versions = [torch.__version__, transformers.__version__, str(torch.get_num_threads())]
    for part in (config.read_text(), *overrides, content_hash(), *versions):
        digest.update(part.encode() + b"\0")
    for path in imported_sources(pretrain_captioner.__name__):
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
