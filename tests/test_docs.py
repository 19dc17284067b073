"""README and docs: their Python runs, the commands they show exist, and the site is whole.

A block of Python that cannot run in a test stands behind the line `<!-- skip: the reason -->`.
"""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from dali_llava.cli import build_parser
from dali_llava.train.arguments import StageArguments


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^(?:<!-- skip: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass
class Block:
    language: str
    code: str
    line: int
    skip: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1, match["reason"])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def commands(program: str) -> list:
    """Every shell line of the docs that starts with `program`, as parameters of a test."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash", "sh", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[: len(shlex.split(program))] == shlex.split(program):
                    found.append(pytest.param(words, id=f"{page.name}:{' '.join(words)[:60]}"))
    assert found, f"no page shows {program}"
    return found


@pytest.fixture
def reader_folder(tiny_model_dir, media_dir, tmp_path, monkeypatch) -> Path:
    """A working folder as the docs take it to be, with caches of its own."""
    for file in media_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "model").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return tmp_path


def python_pages() -> list:
    """A parameter for the Python of each page, and a skipped one for each block that says so."""
    parameters = []
    for page in PAGES:
        found = blocks(page, "python")
        if any(block.skip is None for block in found):
            parameters.append(pytest.param(page, id=page.name))
        for block in found:
            if block.skip is not None:
                mark = pytest.mark.skip(reason=f"{page.name}, line {block.line}: {block.skip}")
                parameters.append(pytest.param(page, id=f"{page.name}:{block.line}", marks=mark))
    return parameters


@pytest.mark.parametrize("page", python_pages())
def test_the_python_of_a_page_runs(page, reader_folder):
    namespace = {}
    for block in blocks(page, "python"):
        if block.skip is None:
            # Line numbers of a traceback are then those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("words", commands("dali-llava"))
def test_a_command_that_is_shown_parses(words):
    build_parser().parse_args(words[1:])


@pytest.mark.parametrize("words", commands("make"))
def test_a_make_target_that_is_shown_exists(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


@pytest.mark.parametrize("words", commands("accelerate launch") + commands("python train/prefilter.py"))
def test_a_stage_that_is_shown_has_its_script_configuration_and_options(words):
    start = next(index for index, word in enumerate(words) if word.endswith(".py"))  # accelerate's own options before
    script, config, *options = words[start:]
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()
    module = importlib.import_module("dali_llava." + script.removesuffix(".py").replace("/", "."))
    (arguments,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageArguments) and value is not StageArguments
    )
    known = {field.name for field in fields(arguments)}
    assert {option.removeprefix("--") for option in options if option.startswith("--")} <= known


def test_every_file_that_the_docs_name_is_there():
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            if not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
        for name in re.findall(r"`((?:modeling|processing|train|eval|dali_llava|docs|tests)/[\w./-]*)`", text):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_the_readme_opens_with_the_two_commands():
    first = blocks(ROOT / "README.md", "bash")[0]
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == ["make quickstart", "make test"]
    assert first.line <= 5


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs, of the dev extra, is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr
    for page in (ROOT / "docs").glob("**/*.md"):
        folder = page.relative_to(ROOT / "docs").with_suffix("")
        folder = folder.parent if page.stem == "index" else folder
        assert (tmp_path / "site" / folder / "index.html").is_file()
