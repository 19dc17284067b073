"""The stages that can be planned: their arguments, and the configuration of their base model."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import PROCESSOR_NAME, cached_file

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.train.arguments import StageArguments
from dali_llava.train.planning.stage_model import StageModel


STAGES = ("prefix_tune", "align", "distill", "sft", "lavcap")  # modules of `dali_llava.train`


def stage_of(config: Path) -> str:
    """
    Return the stage that a configuration is for: the one whose name starts the name of the file.

    Raises:
        ValueError: no stage has such a name.
    """
    for name in STAGES:
        if config.stem.startswith(name):
            return name
    raise ValueError(f"{config}: its name does not start with a stage; give --stage, one of {', '.join(STAGES)}.")


def planned_stage(
    name: str, config: Path, words: Sequence[str] = ()
) -> tuple[StageArguments, StageModel, LlavaAudioConfig, int, str]:
    """
    Parse the arguments of a stage and read the configuration of its base model. Reads no weights.

    Args:
        name: one of `STAGES`.
        config: YAML file of the stage.
        words: fields that override the file, as on the command line of the stage.

    Returns:
        the arguments, the model of the stage, the configuration, the largest number of images of a sample, and a
        description of the configuration's origin.

    Raises:
        ValueError, OSError: as in the stage's script.
    """
    if name not in STAGES:
        raise ValueError(f"stage: unknown stage '{name}'; known: {', '.join(STAGES)}.")
    module = importlib.import_module(f"dali_llava.train.{name}")
    own = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    arguments = module.parse([str(config), "--report_to", "none", *own, *words])
    if arguments.base_model:
        source, hub_kwargs = find_checkpoint(arguments.base_model).config
        config, frames = LlavaAudioConfig.from_pretrained(source, **hub_kwargs), frames_of(arguments.base_model)
        origin = f"base model {source}"
    else:
        config, frames = getattr(module, "paper_sizes", lambda: (LlavaAudioConfig(), 1))()
        config.dtype, origin = "bfloat16", "no base model: sizes of the paper in bfloat16"
    if hasattr(module, "fused_config"):
        config = module.fused_config(arguments, config)
    return arguments, module.stage_model(arguments, config), config, frames, origin


def frames_of(base_model: str) -> int:
    """Return the largest number of images of a sample, which the processor of a base model has."""
    source, hub_kwargs = find_checkpoint(base_model).processor
    return json.loads(Path(cached_file(source, PROCESSOR_NAME, **hub_kwargs)).read_text()).get("num_frames", 1)
