"""SPICE of captions under Java, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.spice_process import find_corenlp, require_programs, spice
from dali_llava.eval.metrics.tokenization import find_java


class Spice(ReferenceMetric):
    """
    SPICE 1.0: `spice`, in [0, 1]. Needs Java and Stanford CoreNLP 3.6.0.

    F-score over the tuples of scene graphs (objects, attributes, relations) of a caption and its references, averaged
    over captions.
    """

    CITATION = """
        @inproceedings{anderson2016spice,
          title={{SPICE}: Semantic Propositional Image Caption Evaluation},
          author={Anderson, Peter and Fernando, Basura and Johnson, Mark and Gould, Stephen},
          booktitle={ECCV}, year={2016}}
    """

    def score(
        self, predictions: list[str], references: list[list[str]], corenlp: str | None = None
    ) -> dict[str, ClipScores]:
        programs = require_programs(find_java(), find_corenlp(corenlp))
        return {"spice": spice(predictions, references, *programs)}
