"""Next-token training on captions, for the prefix and the audio projector."""

from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Minimises the negative log-likelihood of the answers in batches of `CaptionCollator` (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, pretrained=model, **kwargs)
