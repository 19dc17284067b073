"""SPIDEr of captions under Java, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import cider_d, spider
from dali_llava.eval.metrics.spice_process import find_corenlp, require_programs, spice
from dali_llava.eval.metrics.tokenization import find_java


class Spider(ReferenceMetric):
    """
    SPIDEr, the mean of CIDEr-D and SPICE: `spider`, in [0, 5.5]. Needs Java and Stanford CoreNLP 3.6.0.
    """

    CITATION = """
        @inproceedings{liu2017spider,
          title={Improved Image Captioning via Policy Gradient Optimization of {SPIDEr}},
          author={Liu, Siqi and Zhu, Zhenhai and Ye, Ning and Guadarrama, Sergio and Murphy, Kevin},
          booktitle={ICCV}, year={2017}}
    """

    def score(
        self, predictions: list[str], references: list[list[str]], corenlp: str | None = None
    ) -> dict[str, ClipScores]:
        programs = require_programs(find_java(), find_corenlp(corenlp))
        scores = cider_d(predictions, references), spice(predictions, references, *programs)
        return {"spider": spider(*scores)}
