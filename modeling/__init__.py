"""The model code that a checkpoint carries: configuration, towers, model."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_cav_mae import CavMaeAudioConfig
from .configuration_ced import CedAudioConfig
from .configuration_llava_audio import LlavaAudioConfig
from .fusion import Fusion, register_fusion
from .modeling_cav_mae import CavMaeAudioModel
from .modeling_ced import CedAudioModel
from .modeling_llava_audio import LlavaAudioForConditionalGeneration, LlavaAudioModel
from .partial_llava_audio import LlavaAudioOnlyForConditionalGeneration, LlavaAudioTowers


# Registration lets the Auto classes load models without trust_remote_code. audio_towers.py registers the towers.
AutoConfig.register("llava_audio", LlavaAudioConfig, exist_ok=True)
AutoModel.register(LlavaAudioConfig, LlavaAudioModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaAudioConfig, LlavaAudioForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaAudioConfig, LlavaAudioForConditionalGeneration, exist_ok=True)

__all__ = [
    "CavMaeAudioConfig",
    "CavMaeAudioModel",
    "CedAudioConfig",
    "CedAudioModel",
    "Fusion",
    "LlavaAudioConfig",
    "LlavaAudioOnlyForConditionalGeneration",
    "LlavaAudioForConditionalGeneration",
    "LlavaAudioModel",
    "LlavaAudioTowers",
    "register_fusion",
]
