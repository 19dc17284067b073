"""Similarity of the sentence embeddings of captions, as an `evaluate` module."""

from dali_llava.eval.metrics.base import ReferenceMetric
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.sentence_models import SENTENCE_MODEL, SentenceEncoder


class SbertSim(ReferenceMetric):
    """
    Mean cosine similarity of the Sentence-BERT embeddings of a caption and its references: `sbert_sim`, in [-1, 1].
    Needs the extra `metrics`.
    """

    CITATION = """
        @inproceedings{reimers2019sentence,
          title={Sentence-{BERT}: Sentence Embeddings using {Siamese BERT}-Networks},
          author={Reimers, Nils and Gurevych, Iryna},
          booktitle={EMNLP}, year={2019}}
    """

    TOKENIZED = False

    def score(
        self, predictions: list[str], references: list[list[str]], sentence_model: str = SENTENCE_MODEL
    ) -> dict[str, ClipScores]:
        return {"sbert_sim": SentenceEncoder(sentence_model).similarity(predictions, references)}
