"""BLEU, ROUGE-L and CIDEr-D of tokenized captions, by pycocoevalcap's scorers.

The ``evaluate`` modules beside this file wrap these functions; code that scores many systems calls them directly,
without the seconds that importing ``evaluate`` takes.
"""

from collections.abc import Sequence

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 over tokenized captions (Papineni et al. 2002; pycocoevalcap's scorer)."""
    scorer = BleuScorer(n=4)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    scores, _ = scorer.compute_score(option="closest")
    return [float(score) for score in scores]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L over tokenized captions (Lin 2004; pycocoevalcap's scorer). A caption without words scores 0."""
    scorer = Rouge()
    # The scorer splits "" into one empty token, which would match that of an empty reference.
    scores = [
        scorer.calc_score([prediction], captions) if prediction else 0.0
        for prediction, captions in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D over tokenized captions (Vedantam et al. 2015, section 6).

    pycocoevalcap's ``CiderScorer`` clips and penalises lengths, so it is CIDEr-D, and no stems are taken.

    Raises:
        ValueError: for fewer than two clips, whose document frequencies would make every score 0.
    """
    if len(predictions) < 2:
        raise ValueError("CIDEr-D needs at least two clips: its document frequencies come from the whole corpus")
    scorer = CiderScorer(n=4, sigma=6.0)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    score, _ = scorer.compute_score()
    return float(score)
