"""Assembling the processor of a captioner from the tokenizer and the image processor of a released model."""

from tokenizers import AddedToken

from .feature_extraction_llava_audio import LlavaAudioFeatureExtractor
from .processing_llava_audio import LlavaAudioProcessor


PLACEHOLDERS = ("<image>", "<audio>", "<prefix>")
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


def add_placeholders(tokenizer) -> dict[str, int]:
    """
    Add the placeholder tokens that a tokenizer lacks, as special tokens.

    Args:
        tokenizer: the tokenizer of a language model. It is modified.

    Returns:
        the id of each token in `PLACEHOLDERS`.
    """
    known = tokenizer.get_vocab()
    # Without normalisation, a token is also found directly after text.
    new = [AddedToken(token, special=True, normalized=False) for token in PLACEHOLDERS if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS}


def assemble_processor(
    tokenizer, image_processor, feature_extractor, config, chat_template: str | None = None
) -> LlavaAudioProcessor:
    """
    Assemble the processor that fits a configuration.

    Args:
        tokenizer: the tokenizer, with placeholders; see `add_placeholders`.
        image_processor: the image processor of the vision tower.
        feature_extractor: the feature extractor of the audio tower, or None for the one that its configuration
            describes (`audio_config.feature_extractor_kwargs`).
        config: a `LlavaAudioConfig`.
        chat_template: Jinja template; see `LlavaAudioProcessor` for the default.

    Raises:
        ValueError: the placeholders or the number of audio tokens differ from the configuration.
    """
    if feature_extractor is None:
        feature_extractor = LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs)
    processor = LlavaAudioProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        feature_extractor=feature_extractor,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type not in WITHOUT_CLASS_TOKEN),
        prefix_length=config.prefix_length,
        chat_template=chat_template,
        prefix_modalities=config.prefix_modalities,
    )
    for name in ("image", "audio", "prefix"):
        written, expected = getattr(processor, f"{name}_token_id"), getattr(config, f"{name}_token_id")
        if written != expected:
            raise ValueError(
                f"{name}_token_index is {expected} in the configuration, but <{name}> is {written} in the tokenizer; "
                "use the ids that add_placeholders returns"
            )
    config.check_processor(processor)
    return processor
