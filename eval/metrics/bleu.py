"""BLEU-1 to BLEU-4 of a corpus, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import bleu


class Bleu(ReferenceMetric):
    """
    BLEU of a corpus of captions: `bleu_1` to `bleu_4`, in [0, 1].

    Clipped n-gram matches and lengths are summed over the corpus and compared with all references of a caption. The
    brevity penalty uses the closest reference length.
    """

    CITATION = """
        @inproceedings{papineni2002bleu,
          title={{BLEU}: a Method for Automatic Evaluation of Machine Translation},
          author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
          booktitle={ACL}, year={2002}}
    """

    def score(self, predictions: list[str], references: list[list[str]]) -> dict[str, ClipScores]:
        return bleu(predictions, references)
