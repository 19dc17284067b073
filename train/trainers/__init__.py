"""Trainer subclasses, one a kind of objective."""

from .alignment import AlignmentArguments, AlignmentModel, AlignmentTrainer
from .captioning import CaptioningTrainer, TokenViewTrainer, token_views
from .stage import StageArguments, StageTrainer, load_base, train_only
from .words import WordTrainer, word_loss


__all__ = [
    "AlignmentArguments",
    "AlignmentModel",
    "AlignmentTrainer",
    "CaptioningTrainer",
    "StageArguments",
    "StageTrainer",
    "TokenViewTrainer",
    "WordTrainer",
    "load_base",
    "token_views",
    "train_only",
    "word_loss",
]
