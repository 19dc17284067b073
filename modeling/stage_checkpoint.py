"""A stage's checkpoint: only the weights that the stage trained, and the name of the model they belong to."""

import json
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


STAGE_FILE = "stage.json"
STAGE_WEIGHTS = "stage.safetensors"


@dataclass(frozen=True)
class Stage:
    """
    One link of a chain of stages, as its `stage.json` describes it.

    Attributes:
        source, hub_kwargs: the stage's folder or Hub id, and the options to read it with.
        name: the stage's name, such as `align:mmd`.
        base, base_hub_kwargs: the same of the model that it is laid over.
        trained: sorted names of the weights that it holds.
    """

    source: str
    hub_kwargs: dict
    name: str
    base: str
    base_hub_kwargs: dict
    trained: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The trained weights by name.

        Raises:
            ValueError: when the file is damaged, or holds other weights than `stage.json` lists.
            OSError: when the file is missing.
        """
        path = cached_file(self.source, STAGE_WEIGHTS, **self.hub_kwargs)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy or save the stage again.") from error
        if sorted(tensors) != self.trained:
            raise ValueError(f"{self.source}: {STAGE_WEIGHTS} does not hold the weights that {STAGE_FILE} lists.")
        return tensors


def write_stage(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], base: str, stage: str) -> None:
    """
    Write `tensors` and `stage.json` into `directory`; the JSON last, so that a stage that can be read is complete.

    A local `base` is stored relative to `directory`, so that a run's folder can be moved.

    Raises:
        ValueError: when `tensors` is empty.
    """
    if not tensors:
        raise ValueError(f"{directory}: stage '{stage}' trained no weight, so there is nothing to save.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if Path(base).is_dir():
        base = Path(os.path.relpath(Path(base).resolve(), directory.resolve())).as_posix()
    description = {"stage": stage, "base_model_name_or_path": base, "trained": sorted(tensors)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / f".{STAGE_WEIGHTS}", metadata={"format": "pt"})
    os.replace(directory / f".{STAGE_WEIGHTS}", directory / STAGE_WEIGHTS)
    (directory / f".{STAGE_FILE}").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(directory / f".{STAGE_FILE}", directory / STAGE_FILE)


def find_stage(name_or_path: str | os.PathLike, **hub_kwargs) -> Stage | None:
    """
    The stage that a folder or Hub repository holds; None for a whole checkpoint. Reads `stage.json` only.

    Raises:
        ValueError: when `stage.json` is not JSON or does not name its base.
        FileNotFoundError: when the base is a folder that does not exist.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name_or_path, STAGE_FILE, **optional, **hub_kwargs)
    if path is None:
        return None
    try:
        description = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or save the stage again.") from error
    base = description.get("base_model_name_or_path") if isinstance(description, dict) else None
    if not base:
        raise ValueError(f"{path} does not name base_model_name_or_path; add the model that the stage started from.")
    found, found_kwargs = _locate_base(name_or_path, base, hub_kwargs)
    name = description.get("stage", "")
    if found is None:
        expected = (Path(name_or_path) / hub_kwargs.get("subfolder", "") / base).resolve()
        raise FileNotFoundError(
            f"{path}: this folder holds only what the stage '{name}' trained. The rest is in its base model "
            f"'{base}', expected at {expected}, which is not a folder. Copy the base model there too, or run "
            f"`dali-llava merge STAGE OUT` where both are and copy OUT."
        )
    trained = sorted(description.get("trained", []))
    return Stage(str(name_or_path), hub_kwargs, name, found, found_kwargs, trained)


def _locate_base(name_or_path: str | os.PathLike, base: str, hub_kwargs: dict) -> tuple[str | None, dict]:
    """The base's folder or Hub id and the options to read it with; (None, {}) for a folder that does not exist."""
    # `revision` and `subfolder` belong to the stage's own repository.
    others = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
    subfolder = hub_kwargs.get("subfolder", "")
    beside = Path(name_or_path) / subfolder / base
    if beside.is_dir():
        return str(beside.resolve()), others
    if not base.startswith((".", "/", os.sep)):
        return base, others
    inside = posixpath.normpath(posixpath.join(subfolder, base))
    if Path(name_or_path).is_dir() or inside.startswith(("..", "/")):
        return None, {}
    # A run's folder on the Hub: the base is another folder of the stage's repository.
    if inside != ".":
        others["subfolder"] = inside
    if "revision" in hub_kwargs:
        others["revision"] = hub_kwargs["revision"]
    return str(name_or_path), others


def stage_chain(name_or_path: str | os.PathLike, **hub_kwargs) -> list[Stage]:
    """
    The stages of a checkpoint, the last first, down to the whole checkpoint; an empty list for a whole checkpoint.

    Raises:
        ValueError, FileNotFoundError: as `find_stage` does, and for a chain that leads back to itself.
    """
    chain, seen = [], set()
    while (stage := find_stage(name_or_path, **hub_kwargs)) is not None:
        place = (str(name_or_path), hub_kwargs.get("subfolder", ""))
        if place in seen:
            raise ValueError(f"{name_or_path}: {STAGE_FILE} leads back to itself; correct base_model_name_or_path.")
        seen.add(place)
        chain.append(stage)
        name_or_path, hub_kwargs = stage.base, stage.base_hub_kwargs
    return chain


def stage_names(name_or_path: str | os.PathLike, **hub_kwargs) -> list[str]:
    """The names of the stages of `stage_chain`, the last first."""
    return [stage.name for stage in stage_chain(name_or_path, **hub_kwargs)]


def read_stage(name_or_path: str | os.PathLike, **hub_kwargs) -> tuple[str, dict[str, torch.Tensor]] | None:
    """
    The base model's name and the trained tensors of a stage's checkpoint; None for a whole checkpoint.

    Raises:
        ValueError, OSError: as `find_stage` and `Stage.tensors` do.
    """
    stage = find_stage(name_or_path, **hub_kwargs)
    return None if stage is None else (stage.base, stage.tensors())


__all__ = ["Stage", "find_stage", "read_stage", "stage_chain", "stage_names", "write_stage"]
