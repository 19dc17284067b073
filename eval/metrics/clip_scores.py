"""Scores of a corpus as functions of sums over its clips.

Every metric here adds up statistics of the clips and reduces the sum to a score: BLEU counts n-grams, a mean adds up
the scores and the clips, a share adds up hits and trials. The same reduction gives the score of the corpus, of a
single clip, and of any resample of the clips.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


BLEU_SMALL, BLEU_TINY = 1e-9, 1e-15  # the constants with which the scorer of pycocoevalcap avoids divisions by 0

# Parameters of METEOR 1.5 for English (Denkowski & Lavie 2014, table 2).
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym and paraphrase matches


def ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over the second, (..., 2) -> (...); NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-n (Papineni et al. 2002) from statistics (..., 2 n + 2) -> (...).

    The statistics are the matches of each order, the n-grams of each order, and the lengths of caption and reference.
    """
    order = sums.shape[-1] // 2 - 1
    matches, total = sums[..., :order], sums[..., order : 2 * order]
    precision = ((matches + BLEU_TINY) / (total + BLEU_SMALL)).prod(-1) ** (1 / order)
    lengths = (sums[..., -2] + BLEU_TINY) / (sums[..., -1] + BLEU_SMALL)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / lengths))


def meteor(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 (Denkowski & Lavie 2014) from the statistics of its Java process, (..., 23) -> (...).

    The statistics are the lengths of caption and reference, their function words, four numbers for each of the four
    matchers (content words matched in caption and reference, function words likewise), the chunks, and the words
    matched in caption and reference.
    """
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    matched = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # matcher, content or function, caption or reference
    weights = np.array([METEOR_DELTA, 1 - METEOR_DELTA])
    found = np.einsum("m,k,...mks->...s", METEOR_WEIGHTS, weights, matched)
    length = weights[0] * (words - function_words) + weights[1] * function_words
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = np.moveaxis(found / length, -1, 0)
        mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
        fragmentation = sums[..., 20] / sums[..., 21:23].mean(-1)
        return np.nan_to_num(mean * (1 - METEOR_GAMMA * fragmentation**METEOR_BETA))


REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ratio": ratio, "bleu": bleu, "meteor": meteor}


@dataclass(frozen=True)
class ClipScores:
    """
    A metric of the captions of a corpus.

    Args:
        statistics: (clips, K) statistics of each clip.
        reduction: name of the function in `REDUCTIONS` from the sum of the statistics to the score.

    Raises:
        ValueError: the statistics are not finite, or there are no clips.
    """

    statistics: np.ndarray
    reduction: str = "ratio"

    def __post_init__(self) -> None:
        if not len(self.statistics):
            raise ValueError("no captions to score")
        if not np.isfinite(self.statistics).all():
            raise ValueError(f"the score of caption {np.argwhere(~np.isfinite(self.statistics))[0, 0]} is not finite")

    @classmethod
    def mean(cls, scores: Sequence[float]) -> "ClipScores":
        """The metric whose score of a corpus is the mean of the scores of its clips."""
        scores = np.asarray(scores, dtype=np.float64)
        return cls(np.stack([scores, np.ones_like(scores)], -1))

    @property
    def corpus(self) -> float:
        """The score of the corpus; NaN for a share of nothing."""
        return float(self.reduce(self.statistics.sum(0)))

    @property
    def clips(self) -> np.ndarray:
        """(clips,) The score of each clip alone; NaN for a share of nothing."""
        return self.reduce(self.statistics)

    def reduce(self, sums: np.ndarray) -> np.ndarray:
        """Scores (...) of sums of statistics (..., K)."""
        return REDUCTIONS[self.reduction](sums)
