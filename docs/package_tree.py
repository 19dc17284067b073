"""Hook of the documentation's build: lay the package out as it is imported, for mkdocstrings to read.

`modeling/`, `processing/`, `train/` and `eval/` lie at the root and are subpackages of `dali_llava`. mkdocstrings
reads source files without importing them and cannot resolve that mapping, so it gets a copy in the installed layout.
"""

import shutil
import tempfile
import tomllib
from pathlib import Path

from mkdocs.plugins import event_priority


ROOT = Path(__file__).parents[1]
_trees: list[Path] = []


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config):
    """Copy the packages to a temporary folder and point mkdocstrings at it."""
    tree = Path(tempfile.mkdtemp(prefix="dali-llava-docs-"))
    _trees.append(tree)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {"dali_llava": "dali_llava"} | project["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        target = tree.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    return config


def on_post_build(config):
    """Delete the copies."""
    while _trees:
        shutil.rmtree(_trees.pop(), ignore_errors=True)
