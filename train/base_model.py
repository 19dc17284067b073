"""The model that a stage starts from, and what of it the stage trains."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.stage_checkpoint import stage_names
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.arguments import StageArguments


# What writes a stage, by the word its name begins with.
SCRIPTS = {"prefix": "train/prefix_tune.py", "align": "train/align.py"}


def check_base(arguments: StageArguments, after: Sequence[str] = ()) -> None:
    """
    Whether a stage's base model is there and has been through the stages before it, before anything is loaded.

    Args:
        after: the stages that must have come before, of `SCRIPTS`. A whole checkpoint does not tell which it has been
            through; its user is to know.

    Raises:
        ValueError: when no base is named, the one named is no folder, or lacks a stage of `after`.
    """
    base = arguments.base_model
    if not base:
        raise ValueError("no base_model: name the checkpoint of the stage before this one, --base_model DIR.")
    if os.sep in base and not Path(base).is_dir():
        raise ValueError(f"base_model {base}: no such directory; run the stage that writes it first.")
    been = stage_names(base)
    missing = [stage for stage in after if not any(name.partition(":")[0] == stage for name in been)]
    if been and missing:
        raise ValueError(
            f"base_model {base} has been through {', '.join(reversed(been))} only; run {SCRIPTS[missing[0]]} first."
        )


def load_base(arguments: StageArguments) -> tuple[LlavaAudioForConditionalGeneration, LlavaAudioProcessor]:
    """The captioner that a stage starts from, and its processor. `check_base` comes first, then the corpus."""
    base = arguments.base_model
    return LlavaAudioForConditionalGeneration.from_pretrained(base), LlavaAudioProcessor.from_pretrained(base)


def train_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze `model` but for `parts`; a tower without a trained weight builds no graph."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
