"""SPIDEr of captions with a penalty for fluency errors, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import cider_d, spider
from dali_llava.eval.metrics.sentence_models import FLUENCY_MODEL, FluencyDetector, penalize
from dali_llava.eval.metrics.spice_process import find_corenlp, require_programs, spice
from dali_llava.eval.metrics.tokenization import find_java


class SpiderFl(ReferenceMetric):
    """
    SPIDEr-FL: `spider_fl`, in [0, 5.5]. A caption with a fluency error, found by the detector of FENSE, keeps 10% of
    its SPIDEr. Needs Java, Stanford CoreNLP 3.6.0 and the extra `metrics`.
    """

    CITATION = """
        @inproceedings{zhou2022fense,
          title={Can Audio Captions Be Evaluated With Image Caption Metrics?},
          author={Zhou, Zelin and Zhang, Zhiling and Xu, Xuenan and Xie, Zeyu and Wu, Mengyue and Zhu, Kenny Q.},
          booktitle={ICASSP}, year={2022}}
    """

    def _compute(self, predictions: list[str], fluency_model: str = FLUENCY_MODEL, **options) -> dict:
        self._errors = FluencyDetector(fluency_model).errors(predictions)  # the detector reads captions as written
        return super()._compute(predictions=predictions, **options)

    def score(
        self, predictions: list[str], references: list[list[str]], corenlp: str | None = None
    ) -> dict[str, ClipScores]:
        programs = require_programs(find_java(), find_corenlp(corenlp))
        scores = cider_d(predictions, references), spice(predictions, references, *programs)
        return {"spider_fl": penalize(spider(*scores), self._errors)}
