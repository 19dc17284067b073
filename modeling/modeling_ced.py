"""CED as a transformers model: a pre-norm transformer over the patches of a spectrogram in decibels."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ced import CedAudioConfig
from .modeling_cav_mae import CavMaeLayer, CavMaePreTrainedModel, check_spectrograms, positions_of_clips


class CedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over mels, which keeps its stored statistics in training unless they are not frozen."""

    def __init__(self, config: CedAudioConfig):
        super().__init__(config.num_mel_bins, eps=1e-5, momentum=0.01)
        self.frozen = config.freeze_batch_norm

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise (B, frames, mels). Frames outside `mask` (B, frames) do not count and become 0."""
        if mask is None:
            return super().forward(input_features.flatten(0, 1)).view_as(input_features)
        valid = super().forward(input_features[mask])
        return torch.zeros_like(input_features).masked_scatter(mask.unsqueeze(-1), valid)


class CedEmbeddings(nn.Module):
    """Embeddings of spectrogram patches after BatchNorm, with one learned position per column and one per mel row."""

    def __init__(self, config: CedAudioConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        self.init_bn = CedBatchNorm(config)
        self.patch_embeddings = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.time_pos_embed = nn.Parameter(torch.zeros(1, config.hidden_size, 1, columns))
        self.freq_pos_embed = nn.Parameter(torch.zeros(1, config.hidden_size, rows, 1))

    def positions(self, columns: int) -> torch.Tensor:
        """
        Positions of a clip of `columns` patches, (1, rows, columns, width).

        Shorter clips use the first time positions, as in CED. Those of longer clips are interpolated linearly.
        """
        time = self.time_pos_embed
        if columns > time.shape[-1]:
            size = (1, columns)
            resized = nn.functional.interpolate(time.float(), size=size, mode="bilinear", align_corners=False)
            time = resized.to(time.dtype)
        return (time[..., :columns] + self.freq_pos_embed).permute(0, 2, 3, 1)

    def forward(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> torch.Tensor:
        features = self.init_bn(input_features.to(self.init_bn.weight.dtype), input_features_mask)
        # (B, frames, mels) -> (B, 1, mels, frames) -> (B, width, rows, columns)
        patches = self.patch_embeddings(features.to(self.patch_embeddings.weight.dtype).transpose(1, 2).unsqueeze(1))
        patches = patches.permute(0, 2, 3, 1)
        columns_mask = None if input_features_mask is None else input_features_mask[:, :: self.config.patch_size]
        return (patches + positions_of_clips(self.positions, patches.shape[2], columns_mask)).flatten(1, 2)


class CedPreTrainedModel(CavMaePreTrainedModel):
    config: CedAudioConfig
    config_class = CedAudioConfig
    _no_split_modules = ["CedEmbeddings", "CavMaeLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CedEmbeddings):
            init.normal_(module.time_pos_embed, std=module.config.initializer_range)
            init.normal_(module.freq_pos_embed, std=module.config.initializer_range)


class CedAudioModel(CedPreTrainedModel):
    """
    The encoder of CED-base: BatchNorm over 64 mels, 12 blocks, a final norm, tokens of width 768.

    The options of the configuration average the tokens over mel, and project them to another width.
    """

    def __init__(self, config: CedAudioConfig):
        super().__init__(config)
        self.embeddings = CedEmbeddings(config)
        self.layers = nn.ModuleList(CavMaeLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        projects = config.output_size != config.hidden_size
        self.proj = nn.Linear(config.hidden_size, config.output_size) if projects else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def _patch_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Mask of the patches before pooling, (B, frames) -> (B, rows * columns), mel-major."""
        return input_features_mask[:, :: self.config.patch_size].bool().repeat(1, self.config.grid_size[0])

    def token_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Token mask of a frame mask, (B, frames) -> (B, tokens): True for tokens of valid frames."""
        mask = self._patch_mask(input_features_mask)
        return mask[:, : mask.shape[1] // self.config.grid_size[0]] if self.config.mel_pooling else mask

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        r"""
        Args:
            input_features: spectrograms, (B, frames, mels), with frames a multiple of the patch size.
            input_features_mask: (B, frames), True for valid frames; all frames are valid by default.

        Returns:
            `last_hidden_state` of shape (B, tokens, output_size), tokens = mels / patch * frames / patch, mel-major;
            with `mel_pooling`, tokens = frames / patch.

        Raises:
            ValueError: the spectrogram is not 3-D, has the wrong number of mel bins, or its number of frames is not a
                multiple of the patch size.
        """
        check_spectrograms(input_features, self.config)
        attention_mask = None
        if input_features_mask is not None:
            input_features_mask = input_features_mask.bool()
            attention_mask = self._patch_mask(input_features_mask)
        hidden_states = self.embeddings(input_features, input_features_mask)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.norm(hidden_states)
        if self.config.mel_pooling:
            hidden_states = hidden_states.unflatten(1, (self.config.grid_size[0], -1)).mean(1)
        return BaseModelOutput(last_hidden_state=self.proj(hidden_states))


__all__ = ["CedAudioModel", "CedPreTrainedModel"]
