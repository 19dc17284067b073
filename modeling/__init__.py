"""What a checkpoint carries: configuration, towers, model. Flat; siblings import siblings."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_llava_audio import CavMaeAudioConfig, LlavaAudioConfig
from .modeling_cav_mae import CavMaeAudioModel
from .modeling_llava_audio import LlavaAudioForConditionalGeneration, LlavaAudioModel


# With the package installed the Auto classes need no trust_remote_code.
AutoConfig.register("cav_mae_audio", CavMaeAudioConfig, exist_ok=True)
AutoConfig.register("llava_audio", LlavaAudioConfig, exist_ok=True)
AutoModel.register(CavMaeAudioConfig, CavMaeAudioModel, exist_ok=True)
AutoModel.register(LlavaAudioConfig, LlavaAudioModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaAudioConfig, LlavaAudioForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaAudioConfig, LlavaAudioForConditionalGeneration, exist_ok=True)

__all__ = [
    "CavMaeAudioConfig",
    "CavMaeAudioModel",
    "LlavaAudioConfig",
    "LlavaAudioForConditionalGeneration",
    "LlavaAudioModel",
]
