"""Parts of LLaVA-Audio for the stages that do not need the whole model."""

from transformers import AutoModel

from .audio_towers import build_audio_tower
from .configuration_llava_audio import LlavaAudioConfig
from .modeling_llava_audio import LlavaAudioForConditionalGeneration
from .pretrained_llava_audio import LlavaAudioPreTrainedModel, TowerTokens


class LlavaAudioTowers(TowerTokens, LlavaAudioPreTrainedModel):
    """
    The vision tower and the audio tower without the rest of the captioner, for the alignment.

    `from_pretrained` supports the same checkpoints as `LlavaAudioModel` and reads only the weights of the towers.
    `save_stage` writes a stage of the whole captioner.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(?!(model\.)?(vision_tower|audio_tower)\.)"]

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.audio_tower = build_audio_tower(config.audio_config)
        self.post_init()


class LlavaAudioOnlyForConditionalGeneration(LlavaAudioForConditionalGeneration):
    """
    The captioner without its vision tower, for text and audio.

    `from_pretrained` supports the same checkpoints and does not read the weights of the vision tower. `save_stage`
    writes a stage of the whole captioner.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?vision_tower\."]

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config)
        del self.model.vision_tower


__all__ = ["LlavaAudioOnlyForConditionalGeneration", "LlavaAudioTowers"]
