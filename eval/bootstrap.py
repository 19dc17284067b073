"""Uncertainty over clips: bootstrap intervals of metrics, and paired tests of two systems on the same clips.

A resample of the clips, or a permutation of the systems, is a matrix of weights, and its score is the reduction of
weighted sums of the statistics of the clips. So corpus scores such as BLEU and METEOR are computed again for every
resample. CIDEr-D keeps the document frequencies of all clips.

References:
    - Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 11, 13 and 15.
    - Koehn, Statistical significance tests for machine translation evaluation, EMNLP 2004.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .metrics.clip_scores import ClipScores


LEVEL = 0.95  # confidence level of the intervals
RESAMPLES = 2000
PERMUTATIONS = 10_000
_BLOCK = 200  # rows of weights in memory at a time


def _resampled_weights(clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks (rows, clips): how often each resample contains each clip."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        drawn = rng.integers(clips, size=(rows, clips)) + clips * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * clips).reshape(rows, clips).astype(np.float64)


def _swaps(clips: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks (rows, clips) of 0 and 1, whether the systems keep their captions, or all patterns."""
    exact = 2**clips <= permutations
    rng = np.random.default_rng(seed)
    total = 2**clips if exact else permutations
    for start in range(0, total, _BLOCK):
        rows = min(_BLOCK, total - start)
        if exact:
            yield ((np.arange(start, start + rows)[:, None] >> np.arange(clips)) & 1).astype(np.float64)
        else:
            yield rng.integers(2, size=(rows, clips)).astype(np.float64)


def _quantiles(scores: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(clips: Mapping[str, ClipScores], seed: int = 0) -> dict[str, tuple[float, float]]:
    """
    95% percentile intervals of the scores of a system, from 2000 resamples of the clips.

    Args:
        clips: the metrics of the same clips by name.
        seed: seed of the resamples.

    Returns:
        (low, high) by name; empty for a single clip, which has no spread.
    """
    count = max((len(scores.statistics) for scores in clips.values()), default=0)
    if count < 2:
        return {}
    found: dict[str, list[np.ndarray]] = {name: [] for name in clips}
    for weights in _resampled_weights(count, RESAMPLES, seed):
        for name, scores in clips.items():
            found[name].append(scores.reduce(weights @ scores.statistics))
    return {name: _quantiles(np.concatenate(values)) for name, values in found.items()}


@dataclass(frozen=True)
class PairedTest:
    """
    The difference of a metric between two systems, A - B, on the same clips.

    Attributes:
        a, b: the scores.
        difference: a - b.
        interval: 95% interval of the difference, from a paired bootstrap.
        effect_size: Cohen's d of the paired differences: their mean over their standard deviation, computed from
            jackknife pseudo-values, which for a mean are the differences of the clips; None if no clip differs.
        p_value: two-sided p-value of a permutation test, in which each clip swaps its captions with probability 1/2.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    effect_size: float | None
    p_value: float


def paired_test(a: ClipScores, b: ClipScores, seed: int = 0) -> PairedTest:
    """
    Compare a metric of two systems, with 2000 resamples and 10,000 permutations, or all permutations if fewer exist.

    Args:
        a, b: the same metric of the two systems; row i of both is the same clip.
        seed: seed of the resamples and permutations.

    Raises:
        ValueError: the systems have different numbers of clips or other statistics, or fewer than two clips.
    """
    if a.statistics.shape != b.statistics.shape or a.reduction != b.reduction:
        raise ValueError(f"statistics of shapes {a.statistics.shape} and {b.statistics.shape} cannot be paired")
    clips = len(a.statistics)
    if clips < 2:
        raise ValueError("a paired test requires at least two clips")
    sum_a, sum_b = a.statistics.sum(0), b.statistics.sum(0)
    difference = float(a.reduce(sum_a) - b.reduce(sum_b))

    resampled = [
        a.reduce(weights @ a.statistics) - b.reduce(weights @ b.statistics)
        for weights in _resampled_weights(clips, RESAMPLES, seed)
    ]

    extreme = total = 0
    for kept in _swaps(clips, PERMUTATIONS, seed):
        swapped = kept @ (a.statistics - b.statistics) + sum_b
        permuted = a.reduce(swapped) - b.reduce(sum_a + sum_b - swapped)
        # Rounding must not separate a permutation from the observed difference that it repeats.
        extreme += int((np.abs(permuted) >= abs(difference) * (1 - 1e-9) - 1e-12).sum())
        total += len(permuted)
    exact = total == 2**clips
    p_value = extreme / total if exact else (extreme + 1) / (total + 1)  # the observed order is a permutation too

    left_out = a.reduce(sum_a - a.statistics) - b.reduce(sum_b - b.statistics)
    pseudo = clips * difference - (clips - 1) * left_out
    spread = float(np.nanstd(pseudo, ddof=1))
    effect_size = difference / spread if spread > 1e-12 else None
    return PairedTest(a.corpus, b.corpus, difference, _quantiles(np.concatenate(resampled)), effect_size, p_value)
