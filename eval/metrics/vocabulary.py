"""Number of distinct words in captions, as an `evaluate` module."""

from dali_llava.eval.metrics.base import CAPTION, CaptionMetric
from dali_llava.eval.metrics.corpus_scores import vocabulary
from dali_llava.eval.metrics.tokenization import tokenize


class Vocabulary(CaptionMetric):
    """Number of distinct words in the captions of a corpus: `vocabulary`."""

    FEATURES = {"predictions": CAPTION}
    INPUTS = """
        Args:
            predictions: captions.
            tokenizer: "auto" (PTB if Java runs, else Python), "ptb", "python" or "none".
        Returns:
            the number, and `tokenizer`: the tokenizer used.
    """

    def _compute(self, predictions: list[str], tokenizer: str = "auto") -> dict:
        tokens, used = tokenize(predictions, tokenizer)
        return {"vocabulary": vocabulary(tokens), "tokenizer": used}
