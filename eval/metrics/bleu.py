"""BLEU-1 to BLEU-4 of a corpus, as an ``evaluate`` module."""

import datasets
import evaluate

from .corpus_scores import corpus_bleu
from .tokenization import tokenize_pairs


_DESCRIPTION = """BLEU of a corpus of captions: clipped n-gram matches and lengths summed over the corpus, against
all references of a caption, with the closest reference length in the brevity penalty."""

_CITATION = """@inproceedings{papineni2002bleu,
  title={{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={ACL}, year={2002}}"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip.
    references: the reference captions of each clip.
    tokenizer: "auto" (PTB where Java runs, else Python), "ptb", "python" or "none".
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4: fractions in [0, 1]; tokenizer: the one used.
"""


class Bleu(evaluate.Metric):
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
        scores = corpus_bleu(predictions, references)
        return {f"bleu_{n}": score for n, score in enumerate(scores, start=1)} | {"tokenizer": used}
