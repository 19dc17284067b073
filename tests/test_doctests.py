"""The examples in docstrings run and print the expected output."""

import doctest
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest


def modules_with_examples():
    """Names of the modules of all packages that pyproject.toml lists, where the source contains an example."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    found = []
    for package in project["tool"]["setuptools"]["packages"]:
        for folder in importlib.import_module(package).__path__:
            for path in Path(folder).glob("*.py"):
                if ">>> " in path.read_text(encoding="utf-8"):
                    found.append(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return sorted(found)


def solvers_and_functions():
    """Public functions of the transport and Sinkhorn modules, each of which must have an example."""
    from dali_llava.modeling import sinkhorn
    from dali_llava.train import transport

    own = [value for value in vars(sinkhorn).values() if getattr(value, "__module__", None) == sinkhorn.__name__]
    public = [getattr(transport, name) for name in transport.__all__]
    functions = {value for value in (*own, *public, *transport.SOLVERS.values()) if inspect.isfunction(value)}
    return sorted((f for f in functions if not f.__name__.startswith("_")), key=lambda f: f.__name__)


class UnfencedParser(doctest.DocTestParser):
    """Also parses examples inside Markdown fences, as in the docstrings of transformers."""

    def parse(self, string, name="<string>"):
        lines = ("" if line.strip().startswith("```") else line for line in string.splitlines())
        return super().parse("\n".join(lines), name)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_a_module(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(parser=UnfencedParser()).find(module):
        runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.parametrize("function", solvers_and_functions(), ids=lambda function: function.__name__)
def test_solvers_carry_an_example(function):
    assert doctest.DocTestFinder().find(function, globs={})[0].examples
