"""Trainers of the stages."""

from .alignment import AlignmentModel, AlignmentTrainer
from .captioning import CaptioningTrainer
from .stage import StageTrainer


__all__ = ["AlignmentModel", "AlignmentTrainer", "CaptioningTrainer", "StageTrainer"]
