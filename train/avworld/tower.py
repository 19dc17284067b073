"""The audio tower before the alignment: sounds alone, as CAV-MAE stands before DALI."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.arguments import SoundArguments
from dali_llava.train.base_model import train_only
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import input_features

from .statistics import StatisticsLoss


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


@dataclass
class SoundCollator:
    """
    Rows into sounds alone: `input_features` (B, frames, mels).

    Rows of `train.corpus.with_features` hold them already.

    Args:
        processor: of the model to train.
        augmentation: of the spectrograms.
        opener: opens the media, and draws other rows for broken ones.
    """

    processor: LlavaAudioProcessor
    augmentation: Augmentation = Augmentation()
    opener: ClipOpener = field(default_factory=ClipOpener)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "input_features" in rows[0]:
            sounds = torch.stack([torch.as_tensor(row["input_features"]) for row in rows])
        else:
            rate = self.processor.feature_extractor.sampling_rate
            clips = self.opener(rows, audio=True, sampling_rate=rate)
            sounds = input_features([clip.audio for clip in clips], self.processor)
        return {"input_features": self.augmentation(sounds)}
