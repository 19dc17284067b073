"""CIDEr-D of captions, as an ``evaluate`` module."""

import datasets
import evaluate

from .corpus_scores import cider_d
from .tokenization import tokenize_pairs


_DESCRIPTION = """CIDEr-D, which audio captioning calls CIDEr: clipped TF-IDF cosine over 1- to 4-grams with a Gaussian
length penalty (sigma 6), times 10, mean over references and clips. Document frequencies come from the references
given, so a score holds for its whole corpus only."""

_CITATION = """@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR}, year={2015}}"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip, two clips at least.
    references: the reference captions of each clip.
    tokenizer: "auto" (PTB where Java runs, else Python), "ptb", "python" or "none".
Returns:
    cider_d: in [0, 10]; tokenizer: the one used.
"""


class CiderD(evaluate.Metric):
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
        return {"cider_d": cider_d(predictions, references), "tokenizer": used}
