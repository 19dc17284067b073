"""A stage's command line: one YAML file, and any of its fields again as `--field value`."""

import json
import os
import sys
from collections.abc import Callable, Mapping
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
    parser.usage = "%(prog)s CONFIG.yaml [--field value ...] [--debug]"
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
    Run a stage's `main` as a script. It ends with a summary line where `main` returns a `StageTrainer`.

    An error ends the script with one line on stderr and exit code 1. With the argument `--debug` it keeps its
    traceback; `--debug VALUE` is the option of transformers' `TrainingArguments`.
    """
    argv, debug = split_debug(sys.argv[1:])
    warn_of_single_process(os.environ)
    try:
        trained = main(argv)
        if hasattr(trained, "summary"):
            line = trained.summary()
            if trained.is_world_process_zero():
                print(line)
    except (ValueError, OSError, ImportError) as error:  # some file systems need packages of their own
        if debug:
            raise
        message = str(error)
        if message.startswith("Caught "):  # by a loader's worker: a whole traceback, which ends "package.Name: ..."
            message = message.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}")


def split_debug(argv: list[str]) -> tuple[list[str], bool]:
    """`argv` without a `--debug` that has no value, and whether there was one."""
    kept = [
        word
        for word, following in zip(argv, [*argv[1:], "--"], strict=True)
        if word != "--debug" or not following.startswith("--")
    ]
    return kept, len(kept) < len(argv)


def warn_of_single_process(environment: Mapping[str, str]) -> None:
    """Warn, on stderr, where `accelerate launch` was asked for several processes and started one."""
    # It sets the address for several processes, but a world size only where it starts them.
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(environment) and not set(sizes) & set(environment):
        print(
            "warning: accelerate launch was asked for several processes but started one, because it found fewer than "
            "two accelerators; add --multi_gpu before the script, and on a CPU also --use_cpu true at the end",
            file=sys.stderr,
        )


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
