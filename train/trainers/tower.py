"""The audio tower before the alignment: sounds alone, as CAV-MAE stands before DALI."""

from dataclasses import dataclass, field

import torch
from torch import nn

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train.losses.statistics import StatisticsLoss

from .sound import SoundArguments
from .stage import train_only


@dataclass
class TowerArguments(SoundArguments):
    """Arguments of the audio tower's pretraining."""

    augmentation_mix: float = field(
        default=0.4, metadata={"help": "Probability with which another clip's sound is laid over a clip's."}
    )
    examples: int = field(
        default=512, metadata={"help": "Rows from which the statistics' means and deviations are taken."}
    )


class TowerModel(nn.Module):
    """
    The audio tower of a captioner, and the loss that teaches it.

    Args:
        captioner: all of it is frozen but the audio tower.
        objective: between audio tokens and the spectrograms that they were made from.
    """

    def __init__(self, captioner: LlavaAudioForConditionalGeneration, objective: StatisticsLoss):
        super().__init__()
        self.captioner, self.objective = captioner, objective
        train_only(captioner, captioner.model.audio_tower)

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss`, a scalar, of normalised spectrograms (B, frames, mels)."""
        tokens = self.captioner.model.encode_audio(input_features)
        return {"loss": self.objective(tokens, input_features)}
