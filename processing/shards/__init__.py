"""Shards: the media of a corpus, decoded and cut once, in tar archives that training streams."""

from .clip import REASONS, ClipSettings
from .prepare import Summary, prepare_shards


__all__ = ["REASONS", "ClipSettings", "Summary", "prepare_shards"]
