"""Feature extractor, processor and media decoding."""

from transformers import AutoFeatureExtractor, AutoProcessor

from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION, LlavaAudioFeatureExtractor
from dali_llava.processing.processing_llava_audio import (
    DALI_CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    SEE_PROMPT,
    SOUND_PROMPT,
    LlavaAudioProcessor,
)


# A saved processor names its classes, and the Auto classes look names up among what is registered. Without this,
# loading our own class from our own package would ask for trust in the checkpoint's copy of the code.
AutoFeatureExtractor.register("llava_audio", LlavaAudioFeatureExtractor, exist_ok=True)
AutoProcessor.register("llava_audio", LlavaAudioProcessor, exist_ok=True)

__all__ = [
    "DALI_CHAT_TEMPLATE",
    "MIN_DURATION",
    "PLAIN_CHAT_TEMPLATE",
    "SEE_PROMPT",
    "SOUND_PROMPT",
    "LlavaAudioFeatureExtractor",
    "LlavaAudioProcessor",
]
