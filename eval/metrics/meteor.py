"""METEOR 1.5 of captions under Java, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.meteor_process import MeteorScorer


class Meteor(ReferenceMetric):
    """
    METEOR 1.5: `meteor`, in [0, 1]. Needs Java.

    Exact, stem, synonym and paraphrase matches with the English parameters, on normalized text. This is the corpus
    score, which differs from the mean of sentence scores.
    """

    CITATION = """
        @inproceedings{denkowski2014meteor,
          title={Meteor Universal: Language Specific Translation Evaluation for Any Target Language},
          author={Denkowski, Michael and Lavie, Alon},
          booktitle={EACL Workshop on Statistical Machine Translation}, year={2014}}
    """

    def _compute(self, **columns) -> dict:
        with MeteorScorer() as self._scorer:  # without Java, raises before anything is tokenized
            return super()._compute(**columns)

    def score(self, predictions: list[str], references: list[list[str]]) -> dict[str, ClipScores]:
        return {"meteor": self._scorer.score(predictions, references)}
