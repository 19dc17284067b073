"""The trained weights of an objective, beside those of the stage: an attention, a temperature, a regression."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dali_llava.atomic import atomic_path
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS, save_alignment_attention


ATTENTION = "attention."  # what precedes the names of an attention's weights in its objective
OBJECTIVE_WEIGHTS = "objective.safetensors"


def write_objective(folder: Path, objective: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """
    Write the weights of an objective: those of its `attention` for `load_alignment_attention`, and all others.

    Args:
        folder: folder to write to. It is created. The weights of an earlier run are removed.
        objective: the objective.
        weights: its whole weights by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    attention = {name.removeprefix(ATTENTION): weights[name] for name in weights if name.startswith(ATTENTION)}
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(ATTENTION)}
    if attention:
        save_alignment_attention(objective.attention, folder, attention)
    else:
        (folder / ATTENTION_WEIGHTS).unlink(missing_ok=True)
    if others:
        with atomic_path(folder / OBJECTIVE_WEIGHTS) as temporary:
            save_file(others, temporary, metadata={"format": "pt"})
    else:
        (folder / OBJECTIVE_WEIGHTS).unlink(missing_ok=True)


def read_objective(folder: Path) -> dict[str, torch.Tensor]:
    """Return what `write_objective` wrote, by the names in the objective."""
    weights = {}
    if (folder / ATTENTION_WEIGHTS).exists():
        weights |= {ATTENTION + name: tensor for name, tensor in load_file(folder / ATTENTION_WEIGHTS).items()}
    if (folder / OBJECTIVE_WEIGHTS).exists():
        weights |= load_file(folder / OBJECTIVE_WEIGHTS)
    return weights
