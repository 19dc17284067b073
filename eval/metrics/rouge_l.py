"""ROUGE-L of captions, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import rouge_l


class RougeL(ReferenceMetric):
    """
    ROUGE-L: `rouge_l`, in [0, 1].

    F-score (beta 1.2) of the longest common subsequence, with the best precision and the best recall over a caption's
    references, averaged over captions.
    """

    CITATION = """
        @inproceedings{lin2004rouge,
          title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
          author={Lin, Chin-Yew},
          booktitle={Text Summarization Branches Out}, year={2004}}
    """

    def score(self, predictions: list[str], references: list[list[str]]) -> dict[str, ClipScores]:
        return {"rouge_l": rouge_l(predictions, references)}
