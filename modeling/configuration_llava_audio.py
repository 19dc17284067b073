"""Configuration of LLaVA-Audio: vision tower, audio tower, language model and learned prefix."""

import torch
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llava.configuration_llava import LlavaConfig

from .audio_towers import build_audio_config
from .fusion import CONCATENATE, build_fusion


AUTO_MAP = {
    "AutoConfig": "configuration_llava_audio.LlavaAudioConfig",
    "AutoModel": "modeling_llava_audio.LlavaAudioModel",
    "AutoModelForImageTextToText": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
    "AutoProcessor": "processing_llava_audio.LlavaAudioProcessor",
}


@strict
class LlavaAudioConfig(LlavaConfig):
    r"""
    Configuration of LLaVA with an audio tower, an audio projector and a learned prefix (DALI). The defaults are the
    sizes of the paper: CLIP ViT-L/14@336, CAV-MAE, Vicuna-7B. `AutoModel` builds the towers and the language model.

    Args:
        vision_config, text_config, audio_config: sub-configurations, each a dict or a configuration. The `model_type`
            of `audio_config` (default `"cav_mae_audio"`) selects the audio tower; see `audio_towers.py`.
        image_token_index, audio_token_index, prefix_token_index: placeholder ids in `input_ids`.
        prefix_length: number of learned vectors per `<prefix>`.
        prefix_initializer_range: initial standard deviation of the prefix. The paper uses N(0, 1e-4), with a variance
            of 1e-4.
        prefix_modalities: modalities captioned with the prefix before the question. Distillation removes `"audio"`.
            Images alone never use the prefix, so their captions equal those of the image captioner.
        fusion: fusion of the audio tokens and image tokens of a sample, a name in `fusion.py`. `"concatenate"` is
            DALI: no fusion, and an MLP projector for each modality. Other fusions are followed by a linear projector.
        fusion_options: keyword arguments of the fusion, such as `{"rescale": True}`.
        vision_pooling: `"patches"`, or `"frame"` for one token per image: the pooled output of the vision tower,
            projected to `vision_config.projection_dim`. The latter needs a fusion.
        sources: the released weights that the model was converted from, each a dict with `kind`, `name`, `license`,
            where the licence was read (`license_from`), and the `parts` that it replaced, such as `audio_tower`.

    Raises:
        ValueError: the audio tower or the fusion is unknown or unsuitable, audio tokens and image tokens differ in
            width, or two placeholders have the same id.

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
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="cav_mae_audio"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    audio_token_index: int = 32002
    prefix_token_index: int = 32003
    prefix_length: int = 16
    prefix_initializer_range: float = 0.01
    prefix_modalities: list[str] | tuple[str, ...] = ("audio", "audiovisual")
    fusion: str = CONCATENATE
    fusion_options: dict | None = None
    vision_pooling: str = "patches"
    sources: list[dict] | tuple[dict, ...] = ()

    attribute_map = {
        "image_token_id": "image_token_index",
        "audio_token_id": "audio_token_index",
        "prefix_token_id": "prefix_token_index",
    }

    def __post_init__(self, **kwargs):
        # A field of version 0.1.0 with a single supported value.
        if (fusion_mode := kwargs.pop("fusion_mode", "concatenate")) != "concatenate":
            raise ValueError(f"fusion_mode={fusion_mode!r} is not supported by this version of the model code.")
        self.audio_config = build_audio_config(self.audio_config, self.sub_configs_defaults["audio_config"].model_type)
        super().__post_init__(**kwargs)
        self._check_vision_pooling()
        if self.audio_config.output_size != self.image_width:
            raise ValueError(
                f"audio_config.output_size ({self.audio_config.output_size}) must equal the image tokens' width "
                f"({self.image_width}): alignment and fusion compare the two."
            )
        with torch.device("meta"):
            build_fusion(self.fusion, self.image_width, self.fusion_options)
        ids = (self.image_token_index, self.audio_token_index, self.prefix_token_index)
        if len(set(ids)) < 3:
            raise ValueError(
                f"image, audio and prefix need different placeholder ids; image/audio/prefix_token_index are {ids}."
            )

    def _check_vision_pooling(self) -> None:
        if self.vision_pooling not in ("patches", "frame"):
            raise ValueError(f"vision_pooling {self.vision_pooling!r} is unknown; choose patches or frame.")
        if self.vision_pooling == "frame":
            if self.fusion == CONCATENATE:
                raise ValueError(f"vision_pooling 'frame' needs a fusion, not {CONCATENATE!r}; set fusion.")
            if not getattr(self.vision_config, "projection_dim", None):
                raise ValueError(
                    f"vision_pooling 'frame' needs vision_config.projection_dim, which "
                    f"{self.vision_config.model_type!r} does not have; use CLIP or vision_pooling 'patches'."
                )

    @property
    def image_width(self) -> int:
        """Width of the image tokens before the projector."""
        if self.vision_pooling == "frame":
            return self.vision_config.projection_dim
        layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.vision_config.hidden_size * layers

    def check_processor(self, processor) -> None:
        """
        Check that a processor writes one placeholder per token of the towers, and computes the tower's spectrograms.

        Raises:
            ValueError: `processor.feature_extractor` and the audio tower differ in the number of tokens, the mel bins
                or the front end, or the processor has another `vision_pooling`.
        """
        if (pooling := getattr(processor, "vision_pooling", "patches")) != self.vision_pooling:
            raise ValueError(
                f"the processor has vision_pooling {pooling!r}, the model {self.vision_pooling!r}; build the "
                f"processor with vision_pooling={self.vision_pooling!r}."
            )
        extractor, expected = processor.feature_extractor, self.audio_config.feature_extractor_kwargs
        tower = f"the audio tower {self.audio_config.model_type!r}"
        remedy = f"build the feature extractor with audio_config.feature_extractor_kwargs: {expected}."
        mels, tower_mels = getattr(extractor, "num_mel_bins", None), expected.get("num_mel_bins")
        if None not in (mels, tower_mels) and mels != tower_mels:
            raise ValueError(f"the feature extractor has {mels} mel bins, {tower} takes {tower_mels}; {remedy}")
        front_end, tower_front_end = getattr(extractor, "front_end", None), expected.get("front_end")
        if None not in (front_end, tower_front_end) and front_end != tower_front_end:
            raise ValueError(
                f"the feature extractor has the front end {front_end!r}, {tower} takes {tower_front_end!r}; {remedy}"
            )
        longest = expected.get("max_length", 1024)
        for frames in (longest // 4, longest // 2, longest):
            written, returned = extractor.num_audio_tokens(frames), self.audio_config.num_audio_tokens(frames)
            if written != returned:
                raise ValueError(
                    f"the processor writes {written} audio placeholders for {frames} frames, {tower} returns "
                    f"{returned} tokens; {remedy}"
                )

    def save_pretrained(self, save_directory, **kwargs):
        # `_auto_class` supports a single name, so the other Auto classes are added here.
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


LlavaAudioConfig.register_for_auto_class()

__all__ = ["LlavaAudioConfig"]
