"""Base classes of the `evaluate` modules in this folder: description, inputs and tokenizer.

`evaluate.load` instantiates the first class of a module that is not abstract, so the classes here are abstract. It
copies only the module, so the modules import from the installed package.
"""

import inspect
from abc import ABC, abstractmethod

import datasets
import evaluate

from .clip_scores import ClipScores
from .tokenization import tokenize_pairs


CAPTION = datasets.Value("string")
CAPTIONS = datasets.Sequence(CAPTION)


class CaptionMetric(evaluate.Metric, ABC):
    """
    A metric of captions. The docstring of a subclass is the metric's description.

    Attributes:
        CITATION: BibTeX of the metric's paper; empty for a metric of this project.
        INPUTS: arguments and returned values of `compute`, in the format of a docstring.
        FEATURES: types of the columns that `compute` takes.
    """

    CITATION = ""
    INPUTS: str
    FEATURES: dict

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=inspect.cleandoc(self.CITATION),
            inputs_description=inspect.cleandoc(self.INPUTS),
            features=datasets.Features(self.FEATURES),
        )

    @abstractmethod
    def _compute(self, **columns) -> dict:
        """Compute the scores by name from the columns in `FEATURES` and the options in `INPUTS`."""


class ReferenceMetric(CaptionMetric):
    """A metric that compares captions with reference captions. A subclass defines `score`.

    Attributes:
        TOKENIZED: whether the captions are tokenized. A sentence model reads them as written.
    """

    FEATURES = {"predictions": CAPTION, "references": CAPTIONS}
    TOKENIZED = True
    INPUTS = """
        Args:
            predictions: one caption per clip.
            references: the reference captions of each clip.
            tokenizer: "auto" (PTB if Java runs, else Python), "ptb", "python" or "none".
            per_caption: whether to return the score of each caption as well.
            corenlp (SPICE, SPIDEr, SPIDEr-FL): folder of Stanford CoreNLP 3.6.0; default: $CORENLP_HOME.
            sentence_model (sbert_sim, FENSE): folder or Hub id of a model of sentence-transformers.
            fluency_model (FENSE, SPIDEr-FL): path or name of the detector of fluency errors.
        Returns:
            the scores, `tokenizer`: the tokenizer used, and with `per_caption`, `NAME_per_caption`: lists of scores.
    """

    @abstractmethod
    def score(self, predictions: list[str], references: list[list[str]], **options) -> dict[str, ClipScores]:
        """Compute the scores of captions by name."""

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        tokenizer: str = "auto",
        per_caption: bool = False,
        **options,
    ) -> dict:
        tokenizer = tokenizer if self.TOKENIZED else "none"
        predictions, references, used = tokenize_pairs(predictions, references, tokenizer)
        found = self.score(predictions, references, **options)
        scores = {name: one.corpus for name, one in found.items()} | {"tokenizer": used}
        if per_caption:
            scores |= {f"{name}_per_caption": one.clips.tolist() for name, one in found.items()}
        return scores


class SourceMetric(CaptionMetric):
    """A metric that compares captions with the sources of the clips. A subclass defines `_compute`."""

    FEATURES = {"predictions": CAPTION, "references": datasets.Sequence(CAPTIONS)}
    INPUTS = """
        Args:
            predictions: one caption per clip.
            references: the sources of each clip, each a list of the phrases that name it.
        Returns:
            the share, in [0, 1], or None if no clip has a source.
    """
