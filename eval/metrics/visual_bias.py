"""Share of answers that assert what only a picture could show, as an ``evaluate`` module."""

import datasets
import evaluate

from .phrases import asserting_share


_DESCRIPTION = """Share of answers, given from sound alone, that hold a word for something only the picture could show,
such as a colour or a background."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: answers to "What can you see ?" from audio alone, without prefix.
    visual_words: words or phrases that only a picture could justify.
Returns:
    visual_bias: a fraction in [0, 1].
"""


class VisualBias(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], visual_words: list[str]) -> dict:
        return {"visual_bias": asserting_share(predictions, visual_words)}
