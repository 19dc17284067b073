"""Shards: the media of a corpus, decoded and cut once, in tar archives that training streams."""

from .clip import REASONS, ClipSettings
from .prepare import ShardSummary, prepare_shards


__all__ = ["REASONS", "ClipSettings", "ShardSummary", "prepare_shards"]
