"""A stage's command line: one YAML file, and any of its fields again as `--field value`."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser


Arguments = TypeVar("Arguments")

CONFIGS = Path(__file__).parent / "configs"


def parse_stage_arguments(arguments: type[Arguments], description: str, argv: list[str] | None = None) -> Arguments:
    """
    Read `CONFIG.yaml [--field value ...]` into the dataclass `arguments`; the command line wins over the file.

    Args:
        arguments: a dataclass of `TrainingArguments`' kind; its fields are the keys that the file may hold.
        description: the script's docstring, shown by `--help`.
        argv: the words after the script's name; those of the process by default.

    Raises:
        SystemExit: on `--help` and on bad usage, as argparse does.
        FileNotFoundError: when the file is not there.
        ValueError: when the file is not a mapping or holds a key that the stage does not know.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(arguments, description=description, allow_abbrev=False)
    parser.usage = "%(prog)s CONFIG.yaml [--field value ...]"
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv if {"-h", "--help"} & set(argv) else ["--help"])
    path, overrides = Path(argv[0]), argv[1:]
    values = read_stage_config(path, {field.name for field in fields(arguments) if field.init})
    words = []
    for key, value in values.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    parsed, unknown = parser.parse_args_into_dataclasses(
        args=[*words, *overrides], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed


def run_stage(main: Callable[[list[str]], object]) -> None:
    """
    Run a stage's `main` as a script: it ends with a line on what was trained, where `main` returns a `StageTrainer`.

    Bad input ends it with one line on stderr and exit code 1, no traceback.
    """
    try:
        trained = main(sys.argv[1:])
        if hasattr(trained, "summary"):
            line = trained.summary()
            if trained.is_world_process_zero():
                print(line)
    except (ValueError, OSError, ImportError) as error:  # some packages are needed by some file systems alone
        told = str(error)
        if told.startswith("Caught "):  # by a loader's worker: a whole traceback, which ends "package.Name: ..."
            told = told.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(told.split())}")


def read_stage_config(path: Path, known: set[str]) -> dict:
    """The mapping in a YAML file, checked against the `known` keys; see `parse_stage_arguments`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration; examples are in {CONFIGS}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'field: value' lines, found a {type(values).__name__}.")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; --help lists the stage's fields.")
    return values
