"""A stage's checkpoint: only the weights that the stage trained, and the name of the model they belong to."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


STAGE_FILE = "stage.json"
STAGE_WEIGHTS = "stage.safetensors"


def write_stage(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], base: str, stage: str) -> None:
    """
    Write `tensors` and their `stage.json` into `directory`; the JSON last, so that what can be read is whole.

    A local `base` is stored relative to `directory`, so that a run's folder can be moved.

    Raises:
        ValueError: when there is nothing to write.
    """
    if not tensors:
        raise ValueError(f"{directory}: stage '{stage}' trained no weight, so there is nothing to save.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if Path(base).is_dir():
        base = os.path.relpath(Path(base).resolve(), directory.resolve())
    description = {"stage": stage, "base_model_name_or_path": base, "trained": sorted(tensors)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / f".{STAGE_WEIGHTS}", metadata={"format": "pt"})
    os.replace(directory / f".{STAGE_WEIGHTS}", directory / STAGE_WEIGHTS)
    (directory / f".{STAGE_FILE}").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(directory / f".{STAGE_FILE}", directory / STAGE_FILE)


def _read_description(name_or_path: str | os.PathLike, **hub_kwargs) -> dict | None:
    """What `stage.json` says, its base an absolute path where it is a folder; None for a whole checkpoint.

    Errors are those of `read_stage`.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name_or_path, STAGE_FILE, **optional, **hub_kwargs)
    if path is None:
        return None
    try:
        description = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or save the stage again.") from error
    base = description.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not name base_model_name_or_path; add the model that the stage started from.")
    beside = Path(name_or_path) / base
    if base.startswith((".", os.sep)) and not beside.is_dir():
        raise FileNotFoundError(
            f"{path} names the base model {beside.resolve()}, which is no folder; bring it back there."
        )
    return description | {"base_model_name_or_path": str(beside.resolve()) if beside.is_dir() else base}


def stage_names(name_or_path: str | os.PathLike, **hub_kwargs) -> list[str]:
    """
    The stages that lead to a checkpoint, the last first, as far back as a whole checkpoint; none for such a one.

    Raises:
        ValueError, FileNotFoundError: as `read_stage` does.
    """
    names = []
    while (found := _read_description(name_or_path, **hub_kwargs)) is not None:
        names.append(found.get("stage", ""))
        name_or_path = found["base_model_name_or_path"]
    return names


def read_stage(name_or_path: str | os.PathLike, **hub_kwargs) -> tuple[str, dict[str, torch.Tensor]] | None:
    """
    The base model's name and the trained tensors of a stage's checkpoint; None for a whole checkpoint.

    Raises:
        ValueError: when a file of the stage is damaged, `stage.json` does not name its base, or the weights beside it
            differ from its list.
        FileNotFoundError: when the base is a folder that is not there any more.
    """
    description = _read_description(name_or_path, **hub_kwargs)
    if description is None:
        return None
    weights = cached_file(name_or_path, STAGE_WEIGHTS, **hub_kwargs)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}); copy or save the stage again.") from error
    if sorted(tensors) != description["trained"]:
        raise ValueError(f"{name_or_path}: {STAGE_WEIGHTS} does not hold the weights that {STAGE_FILE} lists.")
    return description["base_model_name_or_path"], tensors


__all__ = ["read_stage", "stage_names", "write_stage"]
