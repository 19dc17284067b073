"""METEOR 1.5 of captions under Java, as an ``evaluate`` module."""

import datasets
import evaluate

from .meteor_process import MeteorScorer
from .tokenization import tokenize_pairs


_DESCRIPTION = """METEOR 1.5 (exact, stem, synonym and paraphrase matches, English parameters, normalised text): the
corpus score, which is not the mean of sentence scores. Needs Java."""

_CITATION = """@inproceedings{denkowski2014meteor,
  title={Meteor Universal: Language Specific Translation Evaluation for Any Target Language},
  author={Denkowski, Michael and Lavie, Alon},
  booktitle={EACL Workshop on Statistical Machine Translation}, year={2014}}"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip.
    references: the reference captions of each clip.
    tokenizer: "auto" (PTB, as METEOR has Java), "ptb", "python" or "none".
Returns:
    meteor: a fraction in [0, 1]; tokenizer: the one used.
"""


class Meteor(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tokenizer: str = "auto") -> dict:
        with MeteorScorer() as scorer:
            predictions, references, used = tokenize_pairs(predictions, references, tokenizer)
            return {"meteor": scorer.score(predictions, references), "tokenizer": used}
