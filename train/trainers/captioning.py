"""Next-token training of captions: the prefix, the audio projector."""

from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Negative log-likelihood of the answers, on the batches of a caption collator (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, pretrained=model, **kwargs)
