"""Configuration of LLaVA-Audio: vision tower, audio tower, language model and learned prefix."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llava.configuration_llava import LlavaConfig

from .audio_towers import build_audio_config


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
        sources: the released weights that the model was converted from, each a dict with `kind`, `name`, `license` and
            where the licence was read (`license_from`).

    Raises:
        ValueError: the audio tower is unknown or unsuitable, audio tokens and image tokens differ in width, or two
            placeholders have the same id.

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
                f"image, audio and prefix need different placeholder ids; image/audio/prefix_token_index are {ids}."
            )

    def check_processor(self, processor) -> None:
        """
        Check that the number of audio placeholders of a processor equals the number of tokens of the audio tower.

        Raises:
            ValueError: `processor.feature_extractor` and the audio tower differ in the number of tokens or mel bins.
        """
        extractor, expected = processor.feature_extractor, self.audio_config.feature_extractor_kwargs
        tower = f"the audio tower {self.audio_config.model_type!r}"
        remedy = f"build the feature extractor with audio_config.feature_extractor_kwargs: {expected}."
        mels, tower_mels = getattr(extractor, "num_mel_bins", None), expected.get("num_mel_bins")
        if None not in (mels, tower_mels) and mels != tower_mels:
            raise ValueError(f"the feature extractor has {mels} mel bins, {tower} takes {tower_mels}; {remedy}")
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
