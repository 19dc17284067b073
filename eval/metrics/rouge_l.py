"""ROUGE-L of captions, as an ``evaluate`` module."""

import datasets
import evaluate

from .corpus_scores import rouge_l
from .tokenization import tokenize_pairs


_DESCRIPTION = """ROUGE-L: F-score (beta 1.2) of the longest common subsequence, with the best precision and the best
recall over a caption's references; the mean over captions."""

_CITATION = """@inproceedings{lin2004rouge,
  title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out}, year={2004}}"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip.
    references: the reference captions of each clip.
    tokenizer: "auto" (PTB where Java runs, else Python), "ptb", "python" or "none".
Returns:
    rouge_l: a fraction in [0, 1]; tokenizer: the one used.
"""


class RougeL(evaluate.Metric):
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
        predictions, references, used = tokenize_pairs(predictions, references, tokenizer)
        return {"rouge_l": rouge_l(predictions, references), "tokenizer": used}
