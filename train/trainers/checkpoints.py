"""Checkpoints to resume from: written whole, checked before training, and compared with the run that resumes."""

import json
import logging
import os
import shutil
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from dali_llava.atomic import write_text
from dali_llava.train.arguments import StageArguments
from dali_llava.train.engines import requested_engine


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
NEWEST = ("true", "last")  # values of resume_from_checkpoint that select the newest checkpoint

# What may differ in the run that resumes: it does not change the weights.
FREE = {"base_model", "plugins", "eval_split", "feature_cache", "distance_steps", "sample_steps", "force"}
# The fields of `TrainingArguments` that change the weights.
BINDING = {
    *("seed", "data_seed", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
    "label_smoothing_factor",
}


def binding_arguments(arguments: StageArguments) -> dict:
    """Return the fields on which the trained weights depend, as JSON values."""
    own = (
        {field.name for field in fields(arguments) if field.init}
        - {field.name for field in fields(TrainingArguments)}
        - FREE
    )
    values = arguments.to_dict()
    return json.loads(json.dumps({name: values[name] for name in sorted(own | BINDING)}, default=str))


def write_manifest(folder: Path, arguments: StageArguments, stage: str, engine: str) -> None:
    """
    Write `checkpoint.json`, which describes a finished checkpoint: how it was trained, and its files with their sizes.

    Args:
        folder: folder with all other files of the checkpoint.
        arguments: arguments of the run.
        stage: name of the stage, such as `align:mmd`.
        engine: name of the engine; the state of the optimizer is sharded by engine and number of processes.
    """
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    description = {
        "stage": stage,
        "engine": engine,
        "processes": arguments.world_size,
        "arguments": binding_arguments(arguments),
        "files": dict(sorted(files.items())),
    }
    write_text(folder / MANIFEST, json.dumps(description, indent=2) + "\n")


def replace_folder(finished: Path, folder: Path) -> None:
    """Rename `finished` to `folder`, which is removed first if it exists."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(finished, folder)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if all are there."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes, not {size}"
    return None


def newest_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest complete checkpoint in `output_dir`, with a warning about newer ones that are damaged."""
    for folder in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s is damaged (%s); the checkpoint before it is used", folder, damage)
    return None


def check_resume(arguments: StageArguments, stage: str) -> None:
    """
    Set `arguments.resume_from_checkpoint` to the folder to resume from, or to None. Call it before models are loaded.

    The values `true` and `last` select the newest complete checkpoint in `output_dir`, or a start from the beginning
    if there is none.

    Args:
        arguments: arguments of the stage.
        stage: name of the stage.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the checkpoint is damaged, of another stage, or of a run with other arguments, another engine or
            another number of processes.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        arguments.resume_from_checkpoint = None
        return
    if str(wanted).lower() in NEWEST:
        folder = newest_checkpoint(arguments.output_dir)
        if folder is None:
            logger.warning("%s: no complete checkpoint; training starts from the beginning", arguments.output_dir)
            arguments.resume_from_checkpoint = None
            return
    else:
        folder = Path(wanted)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint {folder}: no such folder; give OUTPUT_DIR/checkpoint-N.")
        damage = find_damage(folder)
        if damage is not None:
            raise ValueError(
                f"resume_from_checkpoint {folder}: {damage}; resume from an earlier checkpoint, or from the newest "
                "complete one with --resume_from_checkpoint true."
            )
    _check_run(folder, arguments, stage)
    arguments.resume_from_checkpoint = str(folder)


def _check_run(folder: Path, arguments: StageArguments, stage: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["stage"] != stage:
        raise ValueError(
            f"resume_from_checkpoint {folder}: a checkpoint of the stage {manifest['stage']}, not of {stage}; resume "
            "the same stage, or give the checkpoint as base_model."
        )
    before, now = manifest["arguments"], binding_arguments(arguments)
    changed = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
    if manifest["processes"] != arguments.world_size:
        changed.append(f"processes {manifest['processes']} -> {arguments.world_size}")
    if manifest["engine"] != (engine := requested_engine(arguments)):
        changed.append(f"engine {manifest['engine']} -> {engine}")
    if changed:
        raise ValueError(
            f"resume_from_checkpoint {folder}: the run has changed ({'; '.join(changed)}); restore these values, or "
            "start a new run with the checkpoint as base_model."
        )
