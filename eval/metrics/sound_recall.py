"""Share of audible sources that captions name, as an `evaluate` module."""

from dali_llava.eval.metrics.base import SourceMetric
from dali_llava.eval.metrics.phrases import named_share


class SoundRecall(SourceMetric):
    """
    Share of audible sources that captions name, over all sources of all clips: `sound_recall`.

    A caption names a source if it contains one of the phrases for the source as whole words, in singular or plural,
    ignoring case.
    """

    def _compute(self, predictions: list[str], references: list[list[list[str]]]) -> dict[str, float | None]:
        return {"sound_recall": named_share(predictions, references)}
