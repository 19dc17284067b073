"""Configuration of the CAV-MAE audio tower."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class CavMaeAudioConfig(PreTrainedConfig):
    r"""
    Configuration of the audio branch of CAV-MAE (Gong et al., 2023, arXiv:2210.07839) with DALI's linear layer.

    Args:
        hidden_size: width of the transformer.
        num_hidden_layers: number of audio-only blocks.
        num_joint_layers: number of blocks that CAV-MAE shares between modalities, used with their audio norms.
        num_attention_heads: number of attention heads per block.
        intermediate_size: width of the feed-forward layers.
        output_size: width of the audio tokens, equal to the width of the image tokens.
        patch_size: side of a square patch, in mel bins and in frames.
        num_mel_bins: number of mel bins in the spectrogram, a multiple of `patch_size`.
        max_length: number of frames that the learned positions cover, a multiple of `patch_size`.

    Raises:
        ValueError: a size is not a required multiple. The message names the field.
    """

    model_type = "cav_mae_audio"
    base_config_key = "audio_config"

    hidden_size: int = 768
    num_hidden_layers: int = 11
    num_joint_layers: int = 1
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    output_size: int = 1024
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    patch_size: int = 16
    num_mel_bins: int = 128
    max_length: int = 1024

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 8:
            raise ValueError(
                f"audio_config.hidden_size ({self.hidden_size}) must be a multiple of 8 and of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        for field in ("num_mel_bins", "max_length"):
            if getattr(self, field) % self.patch_size:
                raise ValueError(
                    f"audio_config.{field} ({getattr(self, field)}) must be a multiple of patch_size "
                    f"({self.patch_size})."
                )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches along mel and along time: (8, 64) at full size."""
        return self.num_mel_bins // self.patch_size, self.max_length // self.patch_size

    @property
    def feature_extractor_kwargs(self) -> dict:
        """Arguments of the feature extractor for the tower."""
        return {"num_mel_bins": self.num_mel_bins, "max_length": self.max_length, "patch_size": self.patch_size}

    def num_audio_tokens(self, num_frames: int) -> int:
        """Number of audio tokens of `num_frames` frames, padded to full patches (1024 frames: 512 tokens)."""
        rows, _ = self.grid_size
        return rows * -(-num_frames // self.patch_size)


__all__ = ["CavMaeAudioConfig"]
