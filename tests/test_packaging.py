"""The distributed package: its list of packages, its pins, and an installed wheel."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = sorted(set(PROJECT["project"]["optional-dependencies"]) - {"dev"})
FOLDERS = {"dali_llava": "dali_llava"} | {
    folder: package for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}

CONTRACT = """
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioModel, LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioProcessor, LlavaAudioFeatureExtractor
from dali_llava.train.losses import (
    MMDLoss, TransportLoss, AttentiveTransportLoss, ContrastiveLoss, TokenAssignmentLoss
)
from dali_llava.train.transport import solve_transport
"""


def source_files() -> list[tuple[Path, str]]:
    """Python files of the project, each with the package it belongs to."""
    files = []
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.parent.relative_to(ROOT / folder).parts
            files.append((file, ".".join([package, *inner])))
    return files


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of the package and of the extras, by name. `dev` includes the other extras."""
    project = PROJECT["project"]
    listed = list(map(Requirement, project["dependencies"]))
    for extra in extras:
        listed += map(Requirement, project["optional-dependencies"][extra])
    found = {canonicalize_name(requirement.name): requirement for requirement in listed}
    own = found.pop(project["name"], None)
    return requirements(*own.extras) | found if own else found


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), f"{file} holds exact pins only: no hosts, no paths, no ranges"
    return {canonicalize_name(match[1]): match[2] for match in found}


def test_every_package_of_the_tree_is_listed():
    in_tree = {package for file, package in source_files() if file.name == "__init__.py"}
    assert in_tree == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_code_is_a_package():
    for file, _ in source_files():
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} holds code but no __init__.py"


def test_every_import_is_a_declared_dependency():
    distributions = packages_distributions()
    declared = set(requirements("dev"))
    undeclared = {}
    for file, _ in source_files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dali_llava"}:
                candidates = {canonicalize_name(found) for found in distributions.get(name, [name])}
                if not candidates & declared:
                    undeclared[name] = str(file.relative_to(ROOT))
    assert undeclared == {}


def test_dev_has_every_extra():
    assert requirements(*EXTRAS).items() <= requirements("dev").items()


IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name

extras = set(sys.argv[1:])
for module, names in packages_distributions().items():
    if {canonicalize_name(name) for name in names} & extras:
        sys.modules[module] = None  # importing the module fails as if it were not installed
import dali_llava
for module in pkgutil.walk_packages(dali_llava.__path__, "dali_llava."):
    importlib.import_module(module.name)
for package in ("modeling", "processing", "train", "eval"):
    package = importlib.import_module("dali_llava." + package)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert module.name == "dali_llava.train.trainers.supervised"  # a subclass of TRL's trainer
            assert 'run pip install "dali-llava[trl]"' in str(error)
        print(module.name)
"""


def test_every_module_can_be_imported_without_the_extras():
    names = set(requirements(*EXTRAS)) - set(requirements())
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dali_llava.train.align" in done.stdout.split()


@pytest.mark.parametrize("extra", ["deepspeed", "peft", "tensorboard", "trl"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(extra):
    assert any(f"dali-llava[{extra}]" in file.read_text() for file, _ in source_files())


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_the_pins_lie_in_the_ranges(file):
    pinned = pins(file)
    for name, requirement in requirements("dev").items():
        assert name in pinned, f"{name} is not pinned in {file}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} leaves out the pinned {pinned[name]}"


def test_the_lowest_pins_are_the_lower_bounds():
    pinned = pins("constraints-lowest.txt")
    for name, requirement in requirements("dev").items():
        lowest = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        assert [Version(version) for version in lowest] == [Version(pinned[name])], name


def test_torch_is_the_version_of_the_contract():
    pinned = pins("constraints.txt")
    assert (pinned["torch"], pinned["torchaudio"], pinned["torchvision"]) == ("2.11.0", "2.11.0", "0.26.0")


def test_the_readme_gives_a_reason_for_each_dependency():
    table = {canonicalize_name(name) for name in re.findall(r"^\| `([\w-]+)`", (ROOT / "README.md").read_text(), re.M)}
    assert set(requirements(*EXTRAS)) <= table


@pytest.fixture(scope="module")
def installed_elsewhere(tmp_path_factory) -> Path:
    """A folder into which the wheel, built from the tree, is unpacked by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    # Builds from a copy, because setuptools would include deleted files from an old build/ folder.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", *FOLDERS):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def run_elsewhere(target: Path, code: str, *arguments: str) -> str:
    """Runs code with the installed wheel, outside the repository and without the import hook of editable installs."""
    prelude = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [{str(target)!r}] + [path for path in sys.path if path != {str(ROOT)!r}]
import dali_llava
assert dali_llava.__file__.startswith({str(target)!r}), dali_llava.__file__
"""
    command = [sys.executable, "-I", "-c", prelude + code, *arguments]
    done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_shows_its_help(installed_elsewhere):
    code = 'sys.argv[0] = "dali-llava"\nfrom dali_llava.cli import main\nmain()'
    shown = run_elsewhere(installed_elsewhere, code, "--help")
    for command in ("quickstart", "caption", "evaluate", "score"):
        assert command in shown
    assert (installed_elsewhere / "bin" / "dali-llava").is_file()


def test_the_wheel_has_every_import_of_the_contract(installed_elsewhere):
    check = "\nfor name, module in list(sys.modules.items()):\n    file = getattr(module, '__file__', None)\n"
    check += f"    assert not name.startswith('dali_llava') or file.startswith({str(installed_elsewhere)!r}), file\n"
    run_elsewhere(installed_elsewhere, CONTRACT + check)


def test_the_wheel_holds_what_the_tree_holds(installed_elsewhere):
    source = installed_elsewhere.parent / "source"
    for folder, package in FOLDERS.items():
        here = {
            file.relative_to(source / folder)
            for pattern in ("*.py", "*.yaml", "*.json", "*.jinja")
            for file in (source / folder).rglob(pattern)
        }
        there = installed_elsewhere.joinpath(*package.split("."))
        assert {str(file) for file in here if not (there / file).is_file()} == set()


def test_the_command_line_imports_no_torch_for_its_help():
    code = "import sys\nfrom dali_llava.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    code += 'sys.exit("torch" in sys.modules or "transformers" in sys.modules)'
    for arguments in (["--help"], ["--version"], ["caption", "--help"], ["score", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=ROOT)
