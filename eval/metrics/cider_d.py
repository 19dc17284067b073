"""CIDEr-D of captions, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import cider_d


class CiderD(ReferenceMetric):
    """
    CIDEr-D, which audio captioning calls CIDEr: `cider_d`, in [0, 10].

    Clipped TF-IDF cosine over 1- to 4-grams with a Gaussian length penalty (sigma 6), times 10, averaged over
    references and clips. Document frequencies come from the references, so a score depends on the whole corpus, which
    must have at least two clips.
    """

    CITATION = """
        @inproceedings{vedantam2015cider,
          title={{CIDEr}: Consensus-based Image Description Evaluation},
          author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
          booktitle={CVPR}, year={2015}}
    """

    def score(self, predictions: list[str], references: list[list[str]]) -> dict[str, ClipScores]:
        return {"cider_d": cider_d(predictions, references)}
