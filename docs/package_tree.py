"""Hook of the documentation's build: lay the package out as it is imported, for mkdocstrings to read.

`modeling/`, `processing/`, `train/` and `eval/` lie at the root and are subpackages of `dali_llava`. mkdocstrings
reads source files without importing them and cannot resolve that mapping, so it gets a copy in the installed layout.
In the copy, docstrings that follow transformers' conventions are rewritten in those of mkdocstrings.
"""

import ast
import re
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
    for file in tree.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(plain_docstrings(describe_fields(text)), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    return config


def on_post_build(config):
    """Delete the copies."""
    while _trees:
        shutil.rmtree(_trees.pop(), ignore_errors=True)


def plain_docstrings(text: str) -> str:
    """Drop transformers' types of arguments, which the signature gives too, and its links: "[`Name`]"."""
    text = re.sub(r"^( +\w[\w, ]*) \(`[^`]*`(?:, \*optional\*)?[^()]*\):", r"\1:", text, flags=re.M)
    return re.sub(r"\[(`\w+`)\](?![\[(])", r"\1", text)


def describe_fields(text: str) -> str:
    """Add to a dataclass of arguments the help of its fields, as the section Args of its docstring."""
    lines = text.splitlines()
    for node in reversed([node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]):
        helps = {
            item.target.id: value.value
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call)
            for key, value in _metadata(item.value)
            if key.value == "help"
        }
        docstring = ast.get_docstring(node)
        if helps and docstring:
            section = [docstring, "", "Args:", *(f"    {name}: {told}" for name, told in helps.items())]
            first = node.body[0]
            body = "\n".join(section).replace("\\", "\\\\").replace('"""', r"\"\"\"").splitlines()
            lines[first.lineno - 1 : first.end_lineno] = [
                f'    """{body[0]}',
                *(f"    {each}" for each in body[1:]),
                '    """',
            ]
    return "\n".join(lines) + "\n"


def _metadata(call: ast.Call):
    """Keys and values of the dictionary `metadata` of `field(...)`."""
    for keyword in call.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            yield from zip(keyword.value.keys, keyword.value.values, strict=True)
