"""BLEU, ROUGE-L and CIDEr-D over tokenized captions, with the scorers of pycocoevalcap.

The ``evaluate`` modules in this folder wrap these functions. Code that scores many systems calls the functions
directly, because importing ``evaluate`` takes several seconds.
"""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

from .clip_scores import ClipScores


MAX_ORDER = 4


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, ClipScores]:
    """`bleu_1` to `bleu_4` over tokenized captions (Papineni et al. 2002; counts by pycocoevalcap)."""
    scorer = BleuScorer(n=MAX_ORDER)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    counts = np.array([[*clip["correct"], *clip["guess"]] for clip in scorer.ctest], dtype=np.float64)
    counts = counts.reshape(-1, 2, MAX_ORDER)
    # The closest length counts; of two that are equally close, the shorter.
    closest = [min((abs(length - clip["testlen"]), length) for length in clip["reflen"])[1] for clip in scorer.ctest]
    lengths = np.array([[clip["testlen"] for clip in scorer.ctest], closest], dtype=np.float64).T
    return {
        f"bleu_{n}": ClipScores(np.concatenate([counts[:, 0, :n], counts[:, 1, :n], lengths], -1), "bleu")
        for n in range(1, MAX_ORDER + 1)
    }


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> ClipScores:
    """ROUGE-L over tokenized captions (Lin 2004; scorer of pycocoevalcap). A caption without words scores 0."""
    scorer = Rouge()
    # The scorer splits "" into one empty token, which would match the empty token of an empty reference.
    return ClipScores.mean(
        [
            scorer.calc_score([prediction], captions) if prediction else 0.0
            for prediction, captions in zip(predictions, references, strict=True)
        ]
    )


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> ClipScores:
    """CIDEr-D over tokenized captions (Vedantam et al. 2015, section 6).

    The ``CiderScorer`` of pycocoevalcap implements CIDEr-D: it clips counts and penalises length differences. Words
    are not stemmed.

    Raises:
        ValueError: if there are fewer than two clips, because their document frequencies make every score 0.
    """
    if len(predictions) < 2:
        raise ValueError("CIDEr-D requires at least two clips, because it uses document frequencies of the corpus")
    scorer = CiderScorer(n=MAX_ORDER, sigma=6.0)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    return ClipScores.mean(scorer.compute_score()[1])


def spider(cider_d: ClipScores, spice: ClipScores) -> ClipScores:
    """SPIDEr: the mean of CIDEr-D and SPICE (Liu et al. 2017)."""
    return ClipScores.mean((cider_d.clips + spice.clips) / 2)


def vocabulary(predictions: Sequence[str]) -> int:
    """Number of distinct words in tokenized captions."""
    return len({word for prediction in predictions for word in prediction.split()})
