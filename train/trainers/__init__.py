"""Trainer subclasses, one a kind of objective."""

from .alignment import AlignmentArguments, AlignmentModel, AlignmentTrainer
from .captioning import CaptioningTrainer, TokenViewTrainer, token_views
from .sound import SoundArguments
from .stage import StageArguments, StageTrainer, check_base, load_base, train_only
from .tower import TowerArguments, TowerModel
from .words import WordTrainer, word_loss


__all__ = [
    "AlignmentArguments",
    "AlignmentModel",
    "AlignmentTrainer",
    "CaptioningTrainer",
    "SoundArguments",
    "StageArguments",
    "StageTrainer",
    "TokenViewTrainer",
    "TowerArguments",
    "TowerModel",
    "WordTrainer",
    "check_base",
    "load_base",
    "token_views",
    "train_only",
    "word_loss",
]
