"""
Feature extractor, processor, media decoding and corpora.

The classes are imported on first use, so `dali_llava.processing.corpora` and the help of the commands need no torch.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from dali_llava.processing.chat_templates import DALI_CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE
    from dali_llava.processing.feature_extraction_llava_audio import MIN_DURATION, LlavaAudioFeatureExtractor
    from dali_llava.processing.processing_llava_audio import SEE_PROMPT, SOUND_PROMPT, LlavaAudioProcessor

__all__ = [
    "DALI_CHAT_TEMPLATE",
    "MIN_DURATION",
    "PLAIN_CHAT_TEMPLATE",
    "SEE_PROMPT",
    "SOUND_PROMPT",
    "LlavaAudioFeatureExtractor",
    "LlavaAudioProcessor",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load_classes()
    return globals()[name]


def _load_classes() -> None:
    from transformers import AutoFeatureExtractor, AutoProcessor

    templates = importlib.import_module(".chat_templates", __name__)
    extraction = importlib.import_module(".feature_extraction_llava_audio", __name__)
    processing = importlib.import_module(".processing_llava_audio", __name__)
    for name in __all__:
        module = next(each for each in (templates, processing, extraction) if hasattr(each, name))
        globals()[name] = getattr(module, name)
    # The Auto classes look up the class names of a saved processor among the registered classes. Without registration,
    # they would ask to trust the copy of the code in the checkpoint.
    AutoFeatureExtractor.register("llava_audio", extraction.LlavaAudioFeatureExtractor, exist_ok=True)
    AutoProcessor.register("llava_audio", processing.LlavaAudioProcessor, exist_ok=True)
