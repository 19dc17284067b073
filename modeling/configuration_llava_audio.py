"""Configurations of the captioner that hears: the CAV-MAE audio tower and the whole model."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llava.configuration_llava import LlavaConfig


AUTO_MAP = {
    "AutoConfig": "configuration_llava_audio.LlavaAudioConfig",
    "AutoModel": "modeling_llava_audio.LlavaAudioModel",
    "AutoModelForImageTextToText": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
    "AutoProcessor": "processing_llava_audio.LlavaAudioProcessor",
}


@strict
class CavMaeAudioConfig(PreTrainedConfig):
    r"""
    Audio branch of CAV-MAE (Gong et al., 2023, arXiv:2210.07839) with the linear that DALI puts behind it.

    Args:
        hidden_size: width of the transformer.
        num_hidden_layers: audio-only blocks.
        num_joint_layers: blocks that CAV-MAE shares between modalities, used here with their audio norms.
        num_attention_heads: heads of every block.
        intermediate_size: width of the feed-forward layers.
        output_size: width of the tokens that leave the tower; the image tokens' width.
        patch_size: side of a square patch, in mel bins and in frames.
        num_mel_bins: mel bins of the spectrogram; a multiple of `patch_size`.
        max_length: frames of the spectrogram that the learnt positions cover; a multiple of `patch_size`.

    Raises:
        ValueError: when a size does not divide as stated; the message names the field.
    """

    model_type = "cav_mae_audio"
    base_config_key = "audio_config"

    hidden_size: int = 768
    num_hidden_layers: int = 11
    num_joint_layers: int = 1
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    output_size: int = 1024
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    patch_size: int = 16
    num_mel_bins: int = 128
    max_length: int = 1024

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 8:
            raise ValueError(
                f"audio_config.hidden_size ({self.hidden_size}) must be a multiple of 8 and of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        for field in ("num_mel_bins", "max_length"):
            if getattr(self, field) % self.patch_size:
                raise ValueError(
                    f"audio_config.{field} ({getattr(self, field)}) must be a multiple of patch_size "
                    f"({self.patch_size})."
                )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches along mel and along time: (8, 64) at full size."""
        return self.num_mel_bins // self.patch_size, self.max_length // self.patch_size


@strict
class LlavaAudioConfig(LlavaConfig):
    r"""
    LLaVA with an audio tower, an audio projector and a learnt prefix (DALI). Defaults are the paper's sizes:
    CLIP ViT-L/14@336, CAV-MAE, Vicuna-7B. Vision and language towers are any configuration that `AutoModel` knows.

    Args:
        vision_config, text_config, audio_config: sub-configurations, each a dict or a configuration.
        image_token_index, audio_token_index, prefix_token_index: placeholder ids in `input_ids`.
        prefix_length: learnt vectors a `<prefix>` stands for.
        prefix_initializer_range: standard deviation they start from; the paper draws from N(0, 1e-4), a variance.
        prefix_modalities: what is captioned with the prefix before the question; distillation makes sound alone do
            without. A picture alone never is: its captions stay the captioner's own.
        fusion_mode: how picture and sound enter together; `"concatenate"` puts their tokens side by side (DALI).

    Raises:
        ValueError: when the audio tower's tokens are not as wide as the image tokens, or two placeholders share an id.

    Example:

    ```python
    >>> from dali_llava.modeling import LlavaAudioConfig

    >>> config = LlavaAudioConfig()
    >>> config.audio_config.grid_size, config.prefix_length
    ((8, 64), 16)
    ```"""

    model_type = "llava_audio"

    sub_configs_defaults = {
        **LlavaConfig.sub_configs_defaults,
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32064, "rms_norm_eps": 1e-5}
        ),
        "audio_config": SubConfigSpec(config_class=CavMaeAudioConfig),
    }

    audio_config: dict | PreTrainedConfig | None = None
    audio_token_index: int = 32002
    prefix_token_index: int = 32003
    prefix_length: int = 16
    prefix_initializer_range: float = 0.01
    prefix_modalities: list[str] | tuple[str, ...] = ("audio", "audiovisual")
    fusion_mode: Literal["concatenate"] = "concatenate"

    attribute_map = {
        "image_token_id": "image_token_index",
        "audio_token_id": "audio_token_index",
        "prefix_token_id": "prefix_token_index",
    }

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        image_width = self.vision_config.hidden_size * layers
        if self.audio_config.output_size != image_width:
            raise ValueError(
                f"audio_config.output_size ({self.audio_config.output_size}) must equal the image tokens' width "
                f"({image_width}): alignment compares the two."
            )
        ids = (self.image_token_index, self.audio_token_index, self.prefix_token_index)
        if len(set(ids)) < 3:
            raise ValueError(
                f"image, audio and prefix need a placeholder id each; image/audio/prefix_token_index are {ids}."
            )

    def save_pretrained(self, save_directory, **kwargs):
        # `_auto_class` holds a single name; the others are ours to write, or AutoModel would not find its class.
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


LlavaAudioConfig.register_for_auto_class()

__all__ = ["CavMaeAudioConfig", "LlavaAudioConfig"]
