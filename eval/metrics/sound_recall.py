"""Share of audible sources named, as an ``evaluate`` module."""

import datasets
import evaluate

from .phrases import named_share


_DESCRIPTION = """Share of audible sources that captions name, over all sources of all clips. A source is named when
one of its phrases stands in the caption as whole words, in any case, singular or plural."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip.
    references: the audible sources of each clip, each a list of the phrases that name it.
Returns:
    sound_recall: a fraction in [0, 1], None where no clip has a source.
"""


class SoundRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("string"))),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[list[str]]]) -> dict:
        return {"sound_recall": named_share(predictions, references)}
