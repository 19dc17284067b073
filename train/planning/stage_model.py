"""What a stage loads, trains and reads. Each stage's script describes its own, for training and for planning."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.train.base_model import train_only, whole_weights


def build_on_meta(model_class: type, config: LlavaAudioConfig, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """Build a model on the meta device, with its tied weights, in `dtype`."""
    with torch.device("meta"), init.no_init_weights(), whole_weights():
        model = model_class._from_config(deepcopy(config), dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    return model


def _unchanged(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class StageModel:
    """
    The model of a stage.

    Args:
        model_class: the part of the captioner that the stage loads.
        trained: names of the submodules of `model_class` that the stage trains in full.
        samples: the inputs of each kind of sample, of "image", "image_tokens", "audio" and "prefix".
        finish: function of the model, after its parts are frozen, that returns the module to train. It may add
            adapters or an objective.
        freed: names of the submodules of `model_class` that no step uses, because their outputs are stored.
    """

    model_class: type
    trained: tuple[str, ...]
    samples: tuple[tuple[str, ...], ...]
    finish: Callable[[nn.Module], nn.Module] = _unchanged
    freed: tuple[str, ...] = ()

    def select(self, model: nn.Module) -> nn.Module:
        """Freeze all but the trained parts of a loaded model, and return the module to train."""
        train_only(model, *map(model.get_submodule, self.trained))
        return self.finish(model)

    def free(self, model: nn.Module) -> None:
        """Free the memory of the weights that no step uses."""
        for name in self.freed:
            model.set_submodule(name, nn.Identity())

    def on_meta(self, config: LlavaAudioConfig, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
        """
        Build the module to train on the meta device.

        Args:
            config: configuration of the captioner.
            dtype: dtype of the frozen parts.
            attention: attention implementation; by default that of `from_pretrained`.
        """
        model = build_on_meta(self.model_class, config, dtype, attention)
        self.free(model)
        with torch.device("meta"), init.no_init_weights(), whole_weights():
            return self.select(model)
