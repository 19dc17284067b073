"""Share of sources named among those that the picture gives away, as an ``evaluate`` module."""

import datasets
import evaluate

from .phrases import named_share


_DESCRIPTION = """Share of sources that captions name among those that sound, are visible, and look like no other
class: what a captioner can name from the picture alone. Clips without such a source do not count."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one caption a clip.
    references: the seen sources of each clip (none for some), each a list of the phrases that name it.
Returns:
    seen_recall: a fraction in [0, 1], None where no clip has a seen source.
"""


class SeenRecall(evaluate.Metric):
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
        return {"seen_recall": named_share(predictions, references)}
