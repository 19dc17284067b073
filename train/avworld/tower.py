"""Pretraining of the audio tower on sounds alone, in place of CAV-MAE's."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.arguments import SoundArguments
from dali_llava.train.base_model import train_only
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.clips import ClipOpener, Row
from dali_llava.train.data.collators import input_features
from dali_llava.train.data.draws import Draws

from .statistics import StatisticsLoss


@dataclass
class TowerArguments(SoundArguments):
    """Arguments of the pretraining of the audio tower."""

    augmentation_mix: float = field(
        default=0.4, metadata={"help": "Probability of mixing another clip's sound into a clip."}
    )
    examples: int = field(
        default=512, metadata={"help": "Rows to estimate the means and deviations of the statistics from."}
    )


class TowerModel(nn.Module):
    """
    The audio tower and the loss that it is pretrained with.

    Args:
        towers: all weights but the audio tower's are frozen.
        objective: loss between audio tokens and the spectrograms that they come from.
    """

    def __init__(self, towers: LlavaAudioTowers, objective: StatisticsLoss):
        super().__init__()
        self.towers, self.objective, self.config = towers, objective, towers.config
        train_only(towers, towers.audio_tower)

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss`, a scalar, of normalised spectrograms (B, frames, mels)."""
        tokens = self.towers.encode_audio(input_features)
        return {"loss": self.objective(tokens, input_features)}


@dataclass
class SoundCollator:
    """
    Collates rows into `id` and `input_features` (B, frames, mels). Rows of `with_features` already hold them.

    Args:
        processor: processor of the model to train.
        augmentation: augmentation of the spectrograms.
        opener: opens the media and replaces broken rows.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    augmentation: Augmentation = Augmentation()
    opener: ClipOpener = field(default_factory=ClipOpener)
    draws: Draws = field(default_factory=Draws)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        generators = self.draws(rows)
        if "input_features" in rows[0]:
            sounds = torch.stack([torch.as_tensor(row["input_features"]) for row in rows])
        else:
            rate = self.processor.feature_extractor.sampling_rate
            clips = self.opener(rows, generators, audio=True, sampling_rate=rate)
            rows = [clip.row for clip in clips]
            sounds = input_features([clip.audio for clip in clips], self.processor)
        names = [row["id"] for row in rows]
        return {"id": names, "input_features": self.augmentation(sounds, generators)}
