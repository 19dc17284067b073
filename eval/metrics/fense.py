"""FENSE of captions, as an `evaluate` module."""

from dali_llava.eval.metrics import sentence_models
from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores


class Fense(ReferenceMetric):
    """
    FENSE: `fense`, in [-1, 1]. Needs the extra `metrics`.

    Mean cosine similarity of the sentence embeddings of a caption and its references, of which a caption with a
    fluency error keeps 10%.
    """

    CITATION = """
        @inproceedings{zhou2022fense,
          title={Can Audio Captions Be Evaluated With Image Caption Metrics?},
          author={Zhou, Zelin and Zhang, Zhiling and Xu, Xuenan and Xie, Zeyu and Wu, Mengyue and Zhu, Kenny Q.},
          booktitle={ICASSP}, year={2022}}
    """

    TOKENIZED = False

    def score(
        self,
        predictions: list[str],
        references: list[list[str]],
        sentence_model: str = sentence_models.SENTENCE_MODEL,
        fluency_model: str = sentence_models.FLUENCY_MODEL,
    ) -> dict[str, ClipScores]:
        similarity = sentence_models.SentenceEncoder(sentence_model).similarity(predictions, references)
        errors = sentence_models.FluencyDetector(fluency_model).errors(predictions)
        return {"fense": sentence_models.penalize(similarity, errors)}
