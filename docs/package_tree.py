"""Build hook of the documentation: copies the package in its installed layout for mkdocstrings.

`modeling/`, `processing/`, `train/` and `eval/` are folders at the root and subpackages of `dali_llava`. mkdocstrings
reads source files without importing them and cannot resolve that mapping, so it reads a copy in the installed layout.
In the copy, docstrings in the format of transformers are converted to the format of mkdocstrings.
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
        file.write_text(rewrite_docstrings(text), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    return config


def on_post_build(config):
    """Delete the copies."""
    while _trees:
        shutil.rmtree(_trees.pop(), ignore_errors=True)


def rewrite_docstrings(text: str) -> str:
    """Return the source with each docstring converted by `rewrite`."""
    lines = text.splitlines()
    documented = (ast.ClassDef, ast.FunctionDef)
    for node in sorted(ast.walk(ast.parse(text)), key=lambda node: -getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        if docstring:
            first = node.body[0]
            indent = " " * first.col_offset
            body = rewrite(docstring, node).replace("\\", "\\\\").replace('"""', r"\"\"\"")
            quoted = f'"""{body}\n"""'.splitlines()
            lines[first.lineno - 1 : first.end_lineno] = [indent + line if line else line for line in quoted]
    return "\n".join(lines) + "\n"


def rewrite(docstring: str, node: ast.AST) -> str:
    """Convert a docstring to the format of mkdocstrings.

    - Types of arguments, "(`int`, *optional*)", are removed, because the signature gives them. The brackets of links,
      "[`Name`]", are removed too.
    - Arguments that share a line, "width, height: in pixels.", get one line each.
    - The section of doctests is renamed to Examples.
    - A dataclass of arguments gets the help of its fields as Args.
    - The arguments of a configuration, which has neither `__init__` nor a dataclass decorator, become a list.
    """

    def one_each(match: re.Match) -> str:
        return "".join(f"    {name}:{match['text']}" for name in match["names"].split(", "))

    def as_list(match: re.Match) -> str:
        return "**Attributes:**\n\n" + re.sub(r"^ {4}(\w+):", r"- `\1`:", match[1], flags=re.M)

    docstring = re.sub(r"^( +\w[\w, ]*) \(`[^`]*`(?:, \*optional\*)?[^()]*\):", r"\1:", docstring, flags=re.M)
    docstring = re.sub(r"\[(`\w+`)\](?![\[(])", r"\1", docstring)
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.M)
    several = r"^ {4}(?P<names>\w+(?:, \w+)+):(?P<text> .*\n(?: {5,}\S.*\n)*)"
    docstring = re.sub(several, one_each, docstring + "\n", flags=re.M).rstrip("\n")
    if isinstance(node, ast.ClassDef):
        if helps := field_helps(node):
            docstring += "\n\nArgs:\n" + "\n".join(f"    {name}: {text}" for name, text in helps.items())
        decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        if "__init__" not in methods and "dataclass" not in decorators:
            docstring = re.sub(r"^Args:\n((?: {4}.*\n|\n)*)", as_list, docstring + "\n", flags=re.M).rstrip("\n")
    return docstring


def field_helps(node: ast.ClassDef) -> dict[str, str]:
    """Return the help of each `field(..., metadata={"help": ...})` of a dataclass."""
    helps = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call):
            for keyword in item.value.keywords:
                if keyword.arg == "metadata":
                    helps[item.target.id] = ast.literal_eval(keyword.value)["help"]
    return helps
