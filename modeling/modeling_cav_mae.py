"""The audio branch of CAV-MAE as a transformers model: converts spectrograms to tokens as wide as image tokens."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cav_mae import CavMaeAudioConfig


def sincos_positions(width: int, rows: int, columns: int) -> torch.Tensor:
    """
    Two-dimensional sine-cosine positions, (rows * columns, width), mel-major: token `row * columns + column`.

    The first half of the width encodes time (the column), the second half mel (the row). In each half, sines precede
    cosines, as in the released code of Gong et al. (2023).
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(position: torch.Tensor) -> torch.Tensor:
        angle = position.double()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    time = encode(torch.arange(columns))[None, :].expand(rows, -1, -1)
    mel = encode(torch.arange(rows))[:, None].expand(-1, columns, -1)
    return torch.cat([time, mel], dim=-1).flatten(0, 1).float()


def positions_of_clips(
    positions: Callable[[int], torch.Tensor], columns: int, columns_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    Positions of padded clips: each clip gets the same positions as without padding, for padding on either side.

    Args:
        positions: returns the positions (1, rows, columns, width) of a clip of a number of columns.
        columns: number of columns of the padded clips.
        columns_mask: (B, columns), True for valid columns; all columns are valid by default.

    Returns:
        (1 or B, rows, columns, width), 0 for padding.
    """
    if columns_mask is None:
        return positions(columns)
    lengths = columns_mask.sum(-1).tolist()
    by_length = {length: positions(length) for length in set(lengths)}
    index = (columns_mask.cumsum(-1) - 1).clamp(min=0)
    clips = torch.cat([by_length[length][:, :, row] for length, row in zip(lengths, index, strict=True)])
    return clips * columns_mask[:, None, :, None]


def check_spectrograms(input_features: torch.Tensor, config: CavMaeAudioConfig) -> None:
    """
    Check the shape of spectrograms (B, frames, mels).

    Raises:
        ValueError: the shape does not fit. The message contains both shapes.
    """
    patch, mels = config.patch_size, config.num_mel_bins
    if input_features.dim() != 3 or input_features.shape[2] != mels or input_features.shape[1] % patch:
        raise ValueError(
            f"input_features must be (batch, a multiple of {patch} frames, {mels} mel bins), got "
            f"{tuple(input_features.shape)}."
        )


class CavMaeEmbeddings(nn.Module):
    """Embeddings of spectrogram patches, with positions and the learned vector of the modality."""

    def __init__(self, config: CavMaeAudioConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        self.patch_embeddings = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns, config.hidden_size))
        self.modality_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def positions(self, columns: int) -> torch.Tensor:
        """Positions of a clip of `columns` patches, (1, rows, columns, width), interpolated linearly in time."""
        rows, trained = self.config.grid_size
        grid = self.position_embeddings.unflatten(1, (rows, trained))
        if columns == trained:
            return grid
        channels_first = grid.permute(0, 3, 1, 2).float()
        resized = nn.functional.interpolate(channels_first, size=(rows, columns), mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1).to(grid.dtype)

    def forward(self, input_features: torch.Tensor, columns_mask: torch.Tensor | None = None) -> torch.Tensor:
        # (B, frames, mels) -> (B, 1, mels, frames): the reference flattens patches mel-major. The dtype is that of the
        # convolution, because quantization packs only linear layers.
        input_features = input_features.to(self.patch_embeddings.weight.dtype)
        patches = self.patch_embeddings(input_features.transpose(1, 2).unsqueeze(1))  # (B, width, rows, columns)
        patches = patches.permute(0, 2, 3, 1)
        positions = positions_of_clips(self.positions, patches.shape[2], columns_mask)
        return (patches + positions).flatten(1, 2) + self.modality_embedding


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling + mask) v, (B, heads, N, d) -> (B, N, heads, d), with the softmax in float32."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CavMaeAttention(nn.Module):
    def __init__(self, config: CavMaeAudioConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(hidden_states.shape).contiguous()), weights


class CavMaeMLP(nn.Module):
    def __init__(self, config: CavMaeAudioConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class CavMaeLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block; in a joint block the two norms are the audio ones (`norm1_a`, `norm2_a`)."""

    def __init__(self, config: CavMaeAudioConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CavMaeAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CavMaeMLP(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


class CavMaePreTrainedModel(PreTrainedModel):
    config: CavMaeAudioConfig
    config_class = CavMaeAudioConfig
    base_model_prefix = "audio_tower"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CavMaeEmbeddings", "CavMaeLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CavMaeLayer, "attentions": CavMaeAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CavMaeEmbeddings):
            rows, columns = module.config.grid_size
            init.copy_(module.position_embeddings, sincos_positions(module.config.hidden_size, rows, columns)[None])
            init.normal_(module.modality_embedding, std=module.config.initializer_range)


class CavMaeAudioModel(CavMaePreTrainedModel):
    """
    The audio branch of CAV-MAE with DALI's linear layer: 11 audio blocks, 1 joint block, a final norm, 768 -> 1024.
    """

    def __init__(self, config: CavMaeAudioConfig):
        super().__init__(config)
        self.embeddings = CavMaeEmbeddings(config)
        self.layers = nn.ModuleList(CavMaeLayer(config) for _ in range(config.num_hidden_layers))
        self.joint_layers = nn.ModuleList(CavMaeLayer(config) for _ in range(config.num_joint_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def token_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Token mask of a frame mask, (B, frames) -> (B, tokens): True for tokens of valid frames, mel-major."""
        rows, _ = self.config.grid_size
        return input_features_mask[:, :: self.config.patch_size].bool().repeat(1, rows)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        r"""
        Args:
            input_features: normalised log-mel spectrograms, (B, frames, mels), with frames a multiple of the patch
                size.
            input_features_mask: (B, frames), True for valid frames; all frames are valid by default.

        Returns:
            `last_hidden_state` of shape (B, tokens, output_size), tokens = mels / patch * frames / patch, mel-major.

        Raises:
            ValueError: the spectrogram is not 3-D, has the wrong number of mel bins, or its number of frames is not a
                multiple of the patch size.
        """
        check_spectrograms(input_features, self.config)
        columns_mask = attention_mask = None
        if input_features_mask is not None:
            columns_mask = input_features_mask[:, :: self.config.patch_size].bool()
            attention_mask = self.token_mask(input_features_mask)
        hidden_states = self.embeddings(input_features, columns_mask)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in (*self.layers, *self.joint_layers):
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.proj(self.norm(hidden_states)))


__all__ = ["CavMaeAudioModel", "CavMaePreTrainedModel"]
