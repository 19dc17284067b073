"""An audio tower of another package: a convolution over patches, an MLP block, and the mean over mel rows."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel


@strict
class MelMeanConfig(PreTrainedConfig):
    model_type = "mel_mean_audio"

    hidden_size: int = 24
    output_size: int = 32
    num_mel_bins: int = 64
    patch_size: int = 8
    max_length: int = 256
    initializer_range: float = 0.3

    @property
    def feature_extractor_kwargs(self) -> dict:
        return {
            "num_mel_bins": self.num_mel_bins,
            "max_length": self.max_length,
            "patch_size": self.patch_size,
            "tokens_per_column": 1,
            "mean": -4.346,
            "std": 4.332,
        }

    def num_audio_tokens(self, num_frames: int) -> int:
        return -(-num_frames // self.patch_size)


class MelMeanBlock(GradientCheckpointingLayer):
    def __init__(self, config: MelMeanConfig):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + torch.tanh(self.fc(hidden_states))


class MelMeanModel(PreTrainedModel):
    config: MelMeanConfig
    config_class = MelMeanConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MelMeanBlock"]

    def __init__(self, config: MelMeanConfig):
        super().__init__(config)
        self.patches = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.block = MelMeanBlock(config)
        self.proj = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def token_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        return input_features_mask[:, :: self.config.patch_size].bool()

    def forward(self, input_features, input_features_mask=None, **kwargs) -> BaseModelOutput:
        patches = self.patches(input_features.transpose(1, 2).unsqueeze(1))  # (B, width, mel rows, columns)
        return BaseModelOutput(last_hidden_state=self.proj(self.block(patches.mean(2).transpose(1, 2))))


AutoConfig.register("mel_mean_audio", MelMeanConfig)
AutoModel.register(MelMeanConfig, MelMeanModel)
