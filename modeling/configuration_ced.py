"""Configuration of the CED audio tower."""

from huggingface_hub.dataclasses import strict

from .configuration_cav_mae import CavMaeAudioConfig


FRONT_ENDS = {"decibel": {"mean": 0.0, "std": 1.0}, "kaldi": {"mean": -4.346, "std": 4.332}}


@strict
class CedAudioConfig(CavMaeAudioConfig):
    r"""
    Configuration of CED (Dinkel et al., 2024, arXiv:2308.11957), the audio encoder of LAVCap.

    The defaults are CED-base. See `CavMaeAudioConfig` for the other arguments.

    Args:
        output_size: width of the audio tokens; by default `hidden_size`. Another width adds a linear layer.
        max_length: number of frames that the learned positions cover, a multiple of `patch_size`. Shorter clips use
            the first positions. The positions of longer clips are interpolated linearly in time.
        mel_pooling: whether the tokens of a column are averaged over mel, as in LAVCap (1024 frames: 64 tokens in
            place of 256).
        front_end: `front_end` of the feature extractor: `"decibel"`, which CED was trained with, or `"kaldi"`, the
            filter bank of LAVCap's reference code, with its mean and standard deviation.
        freeze_batch_norm: whether the BatchNorm over mels uses its stored statistics in training too. LAVCap's
            reference code uses those of the batch and updates the stored ones: its filter bank does not have the
            statistics of decibels.

    Raises:
        ValueError: a size is not a required multiple, there are joint blocks, or the front end is unknown. The message
            names the field.
    """

    model_type = "ced_audio"

    num_hidden_layers: int = 12
    num_joint_layers: int = 0
    output_size: int | None = None
    layer_norm_eps: float = 1e-6
    num_mel_bins: int = 64
    mel_pooling: bool = False
    front_end: str = "decibel"
    freeze_batch_norm: bool = True

    def __post_init__(self, **kwargs):
        if self.output_size is None:
            self.output_size = self.hidden_size
        super().__post_init__(**kwargs)
        if self.num_joint_layers:
            raise ValueError(f"audio_config.num_joint_layers ({self.num_joint_layers}) must be 0 for CED.")
        if self.front_end not in FRONT_ENDS:
            raise ValueError(
                f"audio_config.front_end {self.front_end!r} is unknown; choose one of {', '.join(FRONT_ENDS)}."
            )

    @property
    def feature_extractor_kwargs(self) -> dict:
        """Arguments of the feature extractor for the tower."""
        pooling = {"tokens_per_column": 1} if self.mel_pooling else {}
        return {
            **super().feature_extractor_kwargs,
            **pooling,
            "front_end": self.front_end,
            **FRONT_ENDS[self.front_end],
        }

    def num_audio_tokens(self, num_frames: int) -> int:
        """Number of audio tokens of `num_frames` frames, padded to full patches (1024 frames: 256, or 64 pooled)."""
        tokens = super().num_audio_tokens(num_frames)
        return tokens // self.grid_size[0] if self.mel_pooling else tokens


__all__ = ["CedAudioConfig"]
