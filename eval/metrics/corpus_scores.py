"""BLEU, ROUGE-L and CIDEr-D over tokenized captions, with the scorers of pycocoevalcap.

The ``evaluate`` modules in this folder wrap these functions. Code that scores many systems calls the functions
directly, because importing ``evaluate`` takes several seconds.
"""

from collections.abc import Sequence

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 over tokenized captions (Papineni et al. 2002; scorer of pycocoevalcap)."""
    scorer = BleuScorer(n=4)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    scores, _ = scorer.compute_score(option="closest")
    return [float(score) for score in scores]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L over tokenized captions (Lin 2004; scorer of pycocoevalcap). A caption without words scores 0."""
    scorer = Rouge()
    # The scorer splits "" into one empty token, which would match the empty token of an empty reference.
    scores = [
        scorer.calc_score([prediction], captions) if prediction else 0.0
        for prediction, captions in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D over tokenized captions (Vedantam et al. 2015, section 6).

    The ``CiderScorer`` of pycocoevalcap implements CIDEr-D: it clips counts and penalises length differences. Words
    are not stemmed.

    Raises:
        ValueError: if there are fewer than two clips, because their document frequencies make every score 0.
    """
    if len(predictions) < 2:
        raise ValueError("CIDEr-D requires at least two clips, because it uses document frequencies of the corpus")
    scorer = CiderScorer(n=4, sigma=6.0)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    score, _ = scorer.compute_score()
    return float(score)
