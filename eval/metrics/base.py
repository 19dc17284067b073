"""Base classes of the `evaluate` modules in this folder: description, inputs and tokenizer.

`evaluate.load` instantiates the first class of a module that is not abstract, so the classes here are abstract. It
copies only the module, so the modules import from the installed package.
"""

import inspect
from abc import ABC, abstractmethod

import datasets
import evaluate

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
    """A metric that compares tokenized captions with reference captions. A subclass defines `score`."""

    FEATURES = {"predictions": CAPTION, "references": CAPTIONS}
    INPUTS = """
        Args:
            predictions: one caption per clip.
            references: the reference captions of each clip.
            tokenizer: "auto" (PTB if Java runs, else Python), "ptb", "python" or "none".
        Returns:
            the scores, and `tokenizer`: the tokenizer used.
    """

    @abstractmethod
    def score(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """Compute the scores of tokenized captions by name."""

    def _compute(self, predictions: list[str], references: list[list[str]], tokenizer: str = "auto") -> dict:
        predictions, references, used = tokenize_pairs(predictions, references, tokenizer)
        return self.score(predictions, references) | {"tokenizer": used}


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
