"""An objective of another package, with a parameter of its own."""

import torch
from torch import nn

from dali_llava.train.losses import AlignmentLoss, LossOutput, register_objective


class OffsetLoss(AlignmentLoss):
    """Squared distance between the mean tokens, up to a learned offset."""

    def __init__(self, width: int, start: float = 0.0):
        super().__init__()
        self.offset = nn.Parameter(torch.full((width,), float(start)))

    @classmethod
    def from_captioner(cls, captioner, **options):
        return cls(captioner.config.audio_config.output_size, **options)

    def compute(self, audio, image, audio_mask, image_mask):
        loss = (audio.mean(1) + self.offset - image.mean(1)).square().mean()
        return LossOutput(loss, {"offset": self.offset.detach().norm().item()})


register_objective("offset", OffsetLoss)
