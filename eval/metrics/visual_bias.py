"""Share of answers that assert something that only a picture can show, as an `evaluate` module."""

from dali_llava.eval.metrics.base import CAPTION, CaptionMetric
from dali_llava.eval.metrics.phrases import asserting_share


class VisualBias(CaptionMetric):
    """
    Share of answers from sound alone that contain a word for something that only a picture can show, such as a colour
    or a background: `visual_bias`, in [0, 1].
    """

    FEATURES = {"predictions": CAPTION}
    INPUTS = """
        Args:
            predictions: answers to "What can you see ?" from audio alone, without prefix.
            visual_words: words or phrases for properties that only a picture can show.
        Returns:
            visual_bias: a fraction in [0, 1].
    """

    def _compute(self, predictions: list[str], visual_words: list[str]) -> dict[str, float]:
        return {"visual_bias": asserting_share(predictions, visual_words)}
