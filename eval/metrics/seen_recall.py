"""Share of named sources among the sources that a picture identifies, as an `evaluate` module."""

from dali_llava.eval.metrics.base import SourceMetric
from dali_llava.eval.metrics.phrases import named_share


class SeenRecall(SourceMetric):
    """
    Share of named sources among the sources that sound, are visible, and look like no other class: `seen_recall`.

    A captioner can name these sources from the picture alone. Clips without such a source do not count.
    """

    def _compute(self, predictions: list[str], references: list[list[list[str]]]) -> dict[str, float | None]:
        return {"seen_recall": named_share(predictions, references)}
