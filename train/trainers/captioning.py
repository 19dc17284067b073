"""Next-token training on captions, for the prefix and the audio projector."""

from .samples import SampleCaptions
from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Minimises the negative log-likelihood of the answers in batches of `CaptionCollator` (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, pretrained=model, **kwargs)
        if steps := getattr(self.args, "sample_steps", 0):
            self.add_callback(SampleCaptions(self, steps))
