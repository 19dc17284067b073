"""Trainer subclasses, one a kind of objective."""

from .alignment import AlignmentArguments, AlignmentModel, AlignmentTrainer
from .captioning import CaptioningTrainer, TokenViewTrainer, token_view
from .stage import StageArguments, StageTrainer, load_base, train_only


__all__ = [
    "AlignmentArguments",
    "AlignmentModel",
    "AlignmentTrainer",
    "CaptioningTrainer",
    "StageArguments",
    "StageTrainer",
    "TokenViewTrainer",
    "load_base",
    "token_view",
    "train_only",
]
