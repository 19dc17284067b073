"""The model that a stage starts from, and what of it the stage trains."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dali_llava.eval.captioner import load_captioner
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.arguments import StageArguments


# The script that writes a stage, by the first word of the stage's name.
SCRIPTS = {"prefix": "train/prefix_tune.py", "align": "train/align.py"}


def check_base(arguments: StageArguments, after: Sequence[str] = ()) -> None:
    """
    Check a stage's base model from its small files alone, before anything is loaded.

    Args:
        after: stages of `SCRIPTS` that must have come before. A whole checkpoint does not tell which stages it has
            been through, so it passes.

    Raises:
        ValueError: no base model is named, or it does not exist, is not a captioner, or lacks a stage of `after`.
        FileNotFoundError, ConnectionError: as `find_checkpoint` and `Checkpoint.check` do.
    """
    base = arguments.base_model
    if not base:
        raise ValueError("no base_model: name the checkpoint of the stage before this one, --base_model DIR.")
    if not Path(base).exists() and (Path(base).is_absolute() or Path(base).parent.is_dir()):
        raise ValueError(f"base_model {base}: no such directory; run the stage that writes it first.")
    checkpoint = find_checkpoint(base).check()
    names = [stage.name for stage in checkpoint.stages]
    missing = [stage for stage in after if not any(name.partition(":")[0] == stage for name in names)]
    if names and missing:
        raise ValueError(
            f"base_model {base} has been through {', '.join(reversed(names))} only; run {SCRIPTS[missing[0]]} first."
        )


def load_base(
    arguments: StageArguments, model_class: type = LlavaAudioForConditionalGeneration
) -> tuple[nn.Module, LlavaAudioProcessor]:
    """
    The model that a stage starts from, and its processor. Call `check_base` first.

    Args:
        model_class: the part of the captioner that the stage needs. Weights that the base lacks are initialised.
    """
    return load_captioner(arguments.base_model, model_class=model_class, strict=False)


def train_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze `model` except for `parts`; a frozen tower builds no graph."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
