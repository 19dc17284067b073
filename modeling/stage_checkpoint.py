"""
The checkpoint of a stage: the weights that the stage trained, and the name of their base model.

The weights are in `stage.safetensors`. A stage that trained an adapter keeps all its weights in the files of PEFT
instead, `adapter_model.safetensors` and `adapter_config.json`. An adapter that PEFT saved is read as a stage too.
"""

import json
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, cached_file

from .adapters import LowRankUpdate, has_adapter, low_rank_updates, parameter_name, read_adapter_config, write_adapter


STAGE_FILE = "stage.json"
STAGE_WEIGHTS = "stage.safetensors"


@dataclass(frozen=True)
class Stage:
    """
    A stage in a chain of stages, as described in its `stage.json`.

    Attributes:
        source, hub_kwargs: folder or Hub id of the stage, and the options to read it.
        name: name of the stage, such as `align:mmd`.
        base, base_hub_kwargs: folder or Hub id of the base model, and the options to read it.
        trained: sorted names of the trained weights; those of an adapter are the names of its parameters, such as
            `model.language_model.layers.0.mlp.up_proj.lora_A.default.weight`. None if there is no `stage.json`.
    """

    source: str
    hub_kwargs: dict
    name: str
    base: str
    base_hub_kwargs: dict
    trained: list[str] | None = field(default_factory=list)

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The trained weights by name.

        Raises:
            ValueError: the file is damaged, or does not contain the weights that `stage.json` lists.
            OSError: the file is missing.
        """
        file = STAGE_WEIGHTS
        if self.trained is None or has_adapter(self.trained):
            file = ADAPTER_SAFE_WEIGHTS_NAME
        tensors = _load_tensors(cached_file(self.source, file, **self.hub_kwargs))
        if self.trained is not None and sorted(tensors) != self.trained:
            raise ValueError(
                f"{self.source}: {file} does not contain the weights that {STAGE_FILE} lists; copy or save the stage "
                "again."
            )
        return tensors

    def changes(self) -> tuple[dict[str, torch.Tensor], dict[str, LowRankUpdate]]:
        """
        What the stage changes in its base: the weights that it replaces, and the updates of its adapter, by name.

        Raises:
            ValueError, OSError: see `tensors`; or the configuration of the adapter is missing or not supported.
        """
        tensors, updates = self.tensors(), {}
        if has_adapter(tensors):
            config = read_adapter_config(cached_file(self.source, ADAPTER_CONFIG_NAME, **self.hub_kwargs))
            updates = low_rank_updates(tensors, config, self.source)
        return {name: tensor for name, tensor in tensors.items() if not has_adapter([name])}, updates


def load_stage_weights(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The trained weights in the folder of a stage by name, including those of its adapter. The base is not needed.

    Raises:
        ValueError: the file is damaged.
        OSError: the file is missing.
    """
    adapter = Path(directory) / ADAPTER_SAFE_WEIGHTS_NAME
    return _load_tensors(adapter if adapter.is_file() else Path(directory) / STAGE_WEIGHTS)


def _load_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    try:
        return {parameter_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save the stage again.") from error


def write_stage(
    directory: str | os.PathLike, tensors: dict[str, torch.Tensor], base: str, stage: str, adapter=None
) -> None:
    """
    Write `tensors` and `stage.json` to `directory`. The JSON file is last, so an incomplete stage cannot be read.

    A local `base` is stored relative to `directory`, so the folder of a run can be moved.

    Args:
        directory: folder of the stage.
        tensors: the trained tensors by name. Names of an adapter are those of its parameters.
        base, stage: folder or Hub id of the base model, and name of the stage.
        adapter: the `peft.LoraConfig` of the adapter in `tensors`, if there is one.

    Raises:
        ValueError: `tensors` is empty, or a tensor is empty or not finite.
    """
    if not tensors:
        raise ValueError(f"{directory}: stage '{stage}' trained no weights, so there is nothing to save.")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{directory}: {name} is empty; pass the whole weights of a sharded model.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{directory}: {name} contains NaN or infinity, so the stage '{stage}' is not saved; resume from an "
                "earlier checkpoint with a lower learning rate."
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if Path(base).is_dir():
        base = Path(os.path.relpath(Path(base).resolve(), directory.resolve())).as_posix()
    description = {"stage": stage, "base_model_name_or_path": base, "trained": sorted(tensors)}
    if adapter is not None:
        write_adapter(directory, adapter, tensors)
        replaced = (STAGE_WEIGHTS,)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / f".{STAGE_WEIGHTS}", metadata={"format": "pt"})
        os.replace(directory / f".{STAGE_WEIGHTS}", directory / STAGE_WEIGHTS)
        replaced = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME)
    (directory / f".{STAGE_FILE}").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(directory / f".{STAGE_FILE}", directory / STAGE_FILE)
    for name in replaced:  # of an earlier stage in this folder
        (directory / name).unlink(missing_ok=True)


def find_stage(name_or_path: str | os.PathLike, **hub_kwargs) -> Stage | None:
    """
    Find the stage in a folder or Hub repository. Returns None for a whole checkpoint. Reads only JSON files.

    Raises:
        ValueError: `stage.json` or `adapter_config.json` is not JSON or does not contain the base.
        FileNotFoundError: the base is a folder that does not exist.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name_or_path, STAGE_FILE, **optional, **hub_kwargs)
    if path is None:
        return _find_adapter(name_or_path, hub_kwargs)
    try:
        description = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or save the stage again.") from error
    base = description.get("base_model_name_or_path") if isinstance(description, dict) else None
    if not base:
        raise ValueError(f"{path} has no base_model_name_or_path; add the model that the stage started from.")
    found, found_kwargs = _locate_base(name_or_path, base, hub_kwargs)
    name = description.get("stage", "")
    if found is None:
        expected = (Path(name_or_path) / hub_kwargs.get("subfolder", "") / base).resolve()
        raise FileNotFoundError(
            f"{path}: this folder contains only the weights that the stage '{name}' trained. The other weights are in "
            f"its base model '{base}', expected at {expected}, which is not a folder. Copy the base model to this "
            f"place, or run `dali-llava merge STAGE OUT` where both folders exist and copy OUT."
        )
    trained = sorted(description.get("trained", []))
    return Stage(str(name_or_path), hub_kwargs, name, found, found_kwargs, trained)


def _find_adapter(name_or_path: str | os.PathLike, hub_kwargs: dict) -> Stage | None:
    """The adapter in a folder or Hub repository that contains neither a stage nor a model."""
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(name_or_path, CONFIG_NAME, **optional, **hub_kwargs) is not None:
        return None
    path = cached_file(name_or_path, ADAPTER_CONFIG_NAME, **optional, **hub_kwargs)
    if path is None:
        return None
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} has no base_model_name_or_path; add the model that the adapter was trained on.")
    if not Path(base).is_dir() and base.startswith((".", "/", os.sep)):
        raise FileNotFoundError(f"{path}: the base model {base} is not a folder; correct base_model_name_or_path.")
    others = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
    return Stage(str(name_or_path), hub_kwargs, "adapter", base, others, trained=None)


def _locate_base(name_or_path: str | os.PathLike, base: str, hub_kwargs: dict) -> tuple[str | None, dict]:
    """Folder or Hub id of the base and the options to read it; (None, {}) for a folder that does not exist."""
    # `revision` and `subfolder` apply to the repository of the stage.
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
    # If a whole run is on the Hub, the base is another folder in the repository of the stage.
    if inside != ".":
        others["subfolder"] = inside
    if "revision" in hub_kwargs:
        others["revision"] = hub_kwargs["revision"]
    return str(name_or_path), others


def stage_chain(name_or_path: str | os.PathLike, **hub_kwargs) -> list[Stage]:
    """
    The stages of a checkpoint, the last one first; an empty list for a whole checkpoint.

    Raises:
        ValueError: see `find_stage`; or the chain contains a cycle.
        FileNotFoundError: see `find_stage`.
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
    """The names of the stages in `stage_chain`, the last one first."""
    return [stage.name for stage in stage_chain(name_or_path, **hub_kwargs)]


def read_stage(name_or_path: str | os.PathLike, **hub_kwargs) -> tuple[str, dict[str, torch.Tensor]] | None:
    """
    The name of the base model and the trained tensors of a stage; None for a whole checkpoint.

    Raises:
        ValueError, OSError: see `find_stage` and `Stage.tensors`.
    """
    stage = find_stage(name_or_path, **hub_kwargs)
    return None if stage is None else (stage.base, stage.tensors())


__all__ = ["Stage", "find_stage", "load_stage_weights", "read_stage", "stage_chain", "stage_names", "write_stage"]
