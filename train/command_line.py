"""Command line of a stage: one YAML file, and options `--field value` that override its fields."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
import yaml
from transformers import HfArgumentParser

from dali_llava.train.trainers.interruption import run_as_script


Arguments = TypeVar("Arguments")

CONFIGS = Path(__file__).parent / "configs"


def parse_stage_arguments(arguments: type[Arguments], description: str, argv: list[str] | None = None) -> Arguments:
    """
    Parse `CONFIG.yaml [--field value ...]` into the dataclass `arguments`. The command line overrides the file.

    Args:
        arguments: a subclass of `TrainingArguments`. Its fields are the keys that the file may contain.
        description: the script's docstring, shown by `--help`.
        argv: command-line arguments after the script's name; by default those of the process.

    Returns:
        an instance of `arguments`.

    Raises:
        SystemExit: on `--help` and on wrong usage, as in argparse.
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a mapping or contains an unknown key.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(arguments, description=description, allow_abbrev=False)
    parser.usage = "%(prog)s CONFIG.yaml [--field value ...] [--debug]"
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv if {"-h", "--help"} & set(argv) else ["--help"])
    path, overrides = Path(argv[0]), argv[1:]
    values = read_stage_config(path, {field.name for field in fields(arguments) if field.init})
    parsed, unknown = parser.parse_args_into_dataclasses(
        args=[*as_words(values), *overrides], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed


def as_words(values: Mapping) -> list[str]:
    """Return the options `--field value` of a mapping, without fields that are None."""
    words = []
    for key, value in values.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def run_stage(main: Callable[[list[str]], object]) -> None:
    """
    Run a stage's `main` as a script. If `main` returns a `StageTrainer`, its summary line is printed at the end.

    An error prints one line on stderr and exits with code 1. With the argument `--debug`, the traceback is printed.
    `--debug VALUE` is the option of `TrainingArguments`.

    Args:
        main: function that takes the command-line arguments.
    """
    argv, debug = split_debug(sys.argv[1:])
    run_as_script()
    warn_of_single_process(os.environ)
    try:
        trained = main(argv)
        if hasattr(trained, "summary"):
            line = trained.summary()
            if trained.is_world_process_zero():
                print(line)
    except (ValueError, OSError, ImportError) as error:  # ImportError: some fsspec file systems need extra packages
        if debug:
            raise
        message = str(error)
        if message.startswith("Caught "):  # from a DataLoader's worker: a traceback that ends with "package.Name: ..."
            message = message.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}")
    except RuntimeError as error:
        if debug or not is_lost_connection(error):
            raise
        sys.exit(
            f"{Path(sys.argv[0]).name}: error: rank {os.environ.get('RANK', 0)}: another rank ended; read its output, "
            "then continue from the last checkpoint with --resume_from_checkpoint true"
        )


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error means that another process has ended (from gloo, NCCL or the store of torch)."""
    gloo = "gloo" in str(error) and ("Connection" in str(error) or "Broken pipe" in str(error))
    return gloo or isinstance(error, dist.DistError)


def split_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Return `argv` without any `--debug` that has no value, and whether it contained one."""
    kept = [
        word
        for word, following in zip(argv, [*argv[1:], "--"], strict=True)
        if word != "--debug" or not following.startswith("--")
    ]
    return kept, len(kept) < len(argv)


def warn_of_single_process(environment: Mapping[str, str]) -> None:
    """Print a warning on stderr if `accelerate launch` started one process instead of several."""
    # accelerate sets the address if several processes are requested, but a world size only if it starts them.
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(environment) and not set(sizes) & set(environment):
        print(
            "warning: accelerate launch was asked for several processes but started one, because it found fewer than "
            "two accelerators; add --multi_gpu before the script, and on a CPU also --use_cpu true at the end",
            file=sys.stderr,
        )


def read_stage_config(path: Path, known: set[str]) -> dict:
    """Return the mapping in a YAML file, checked against the `known` keys; see `parse_stage_arguments`."""
    values = read_yaml(path)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; --help lists the stage's fields.")
    return values


def read_yaml(path: Path) -> dict:
    """
    Return the mapping in a YAML file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not YAML, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the configuration does not exist; examples are in {CONFIGS}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'field: value' lines, found a {type(values).__name__}.")
    return values
