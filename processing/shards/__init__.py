"""Shards: tar archives with the decoded and cut media of a corpus, for streaming in training."""

from .clip import REASONS, ClipSettings
from .prepare import ShardSummary, prepare_shards


__all__ = ["REASONS", "ClipSettings", "ShardSummary", "prepare_shards"]
