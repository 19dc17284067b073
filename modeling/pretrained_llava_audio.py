"""Base of the models of LLaVA-Audio: loads checkpoints, stages and adapters, and saves stages."""

import copy
import re

import torch
from torch import nn
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_llava_audio import LlavaAudioConfig
from .loading import HUB_OPTIONS, assembled_options, check_device_map, find_checkpoint, use_general_kernels
from .stage_checkpoint import write_stage


# Weights that no stage starts at random.
IMAGE_CAPTIONER = r"(^|\.)(vision_tower|multi_modal_projector|language_model|lm_head)\."


class LearnedPrefix(nn.Embedding):
    """Learned vectors that replace the `<prefix>` placeholders."""

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config.prefix_length, config.text_config.hidden_size)


class LlavaAudioPreTrainedModel(LlavaPreTrainedModel):
    config: LlavaAudioConfig
    config_class = LlavaAudioConfig
    input_modalities = ("image", "audio", "text")

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, LearnedPrefix):
            init.normal_(module.weight, std=self.config.prefix_initializer_range)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        See `PreTrainedModel.from_pretrained`. Also loads a stage or a LoRA adapter, together with its base model.

        The weights of the stages and the base model are merged before they are loaded, so `dtype`, `device_map`,
        `quantization_config` and the other options apply to all weights.

        Raises:
            FileNotFoundError: the folder, the Hub repository or the base model does not exist.
            ConnectionError: the Hub cannot be reached, and the repository is not in the cache.
            ValueError: the checkpoint is of another model, such as LLaVA without audio; weights of the image captioner
                are missing; or the weights of the stage do not match the base model. The message contains the first
                such name.
        """
        kwargs.setdefault("use_safetensors", True)  # weights are never unpickled
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        # The Auto classes replace the name of an adapter by the name of its base.
        adapter_kwargs = kwargs.get("adapter_kwargs") or {}
        adapter = adapter_kwargs.get("_adapter_model_path", pretrained_model_name_or_path)
        if adapter != pretrained_model_name_or_path:
            del kwargs["adapter_kwargs"]
            pretrained_model_name_or_path, kwargs["revision"] = adapter, adapter_kwargs.get("revision")
        hub_kwargs = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        checkpoint = find_checkpoint(pretrained_model_name_or_path, **hub_kwargs)
        checkpoint.check_model_types()
        kwargs |= checkpoint.hub_kwargs
        check_device_map(cls, checkpoint, kwargs)
        source = pretrained_model_name_or_path
        if checkpoint.stages:
            from .modeling_llava_audio import LlavaAudioForConditionalGeneration  # which imports this module

            source, unread = None, cls._keys_to_ignore_on_load_unexpected or ()
            kwargs = assembled_options(checkpoint, LlavaAudioForConditionalGeneration, kwargs, unread)
        wanted = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        # Audio weights may be missing, because a stage trains them. Random weights elsewhere are never intended.
        missing = sorted(name for name in report["missing_keys"] if re.search(IMAGE_CAPTIONER, name))
        if missing:
            raise ValueError(
                f"{checkpoint.source}: {len(missing)} weights of the image captioner are missing, the first is "
                f"{missing[0]}; copy or save the model again, or run `dali-llava convert` on released weights"
            )
        model.name_or_path = model.config.name_or_path = checkpoint.source
        use_general_kernels(model)
        return (model, report) if wanted else model

    def enable_input_require_grads(self) -> None:
        """See `PreTrainedModel.enable_input_require_grads`. Frozen parts still build no autograd graph."""
        for part in self.base_model.children():
            if isinstance(part, PreTrainedModel) and any(weight.requires_grad for weight in part.parameters()):
                part.enable_input_require_grads()

    @property
    def _captioner_prefix(self) -> str:
        """What precedes the names of this model's weights in the captioner, of which this model may be a part."""
        return "" if hasattr(self, self.base_model_prefix) else f"{self.base_model_prefix}."

    def own_names(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename weights of the captioner, such as those of a stage, to the names in this model."""
        return {name.removeprefix(self._captioner_prefix): tensor for name, tensor in weights.items()}

    def save_stage(self, directory, base: str, stage: str, weights: dict[str, torch.Tensor] | None = None) -> None:
        """
        Save the trained weights, including those of an adapter, and the name of their base model.

        Args:
            directory: output folder. `from_pretrained` with this folder loads the merged model.
            base: folder or Hub id of the model that the stage started from.
            stage: name of the stage, such as `align:mmd`.
            weights: the trained weights by their names in this model; by default, the parameters with `requires_grad`.
                Pass them if the parameters are sharded.

        Raises:
            ValueError: no weight is trained, or a weight is empty or not finite.
        """
        if weights is None:
            weights = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        trained = {self._captioner_prefix + name: weight for name, weight in weights.items()}
        config = copy.deepcopy(self.config)
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not quantizer.pre_quantized:
            del config.quantization_config  # for this process only; the files of the base are not quantised
        config.save_pretrained(directory)
        custom_object_save(self, directory)  # a stage also loads without the package
        write_stage(directory, trained, base, stage, adapter=getattr(self, "peft_config", {}).get("default"))


class TowerTokens:
    """Tokens before the projectors, for a model with a `vision_tower` and an `audio_tower`."""

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image tokens before the projector, (images, 3, H, W) -> (images, tokens, vision width)."""
        layers = self.config.vision_feature_layer
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        selected = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            selected = [tokens[:, 1:] for tokens in selected]
        return torch.cat(selected, dim=-1)

    def encode_audio(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Audio tokens before the projector, (clips, frames, mels) -> (clips, tokens, vision width)."""
        # The dtype of a module ignores weights that are packed as integers.
        input_features = input_features.to(self.audio_tower.dtype)
        return self.audio_tower(input_features, input_features_mask, return_dict=True).last_hidden_state


__all__ = ["LlavaAudioPreTrainedModel", "LearnedPrefix", "TowerTokens"]
