"""Contrastive learning on mean tokens, the baseline that DALI is held against."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights


class ContrastiveLoss(AlignmentLoss):
    """Symmetric InfoNCE between mean tokens, by cosine similarity (DALI's contrastive baseline).

    Each pair's audio is to find its image among the batch's, and the other way about; the two cross-entropies are
    averaged. When `torch.distributed` runs, the batch is that of all ranks: each rank's loss covers its own pairs, so
    that the ranks' mean, with gradients averaged as DistributedDataParallel does, is the loss of the whole batch.

    Args:
        temperature: divides the cosines.

    Logs:
        contrastive: the loss of this rank. accuracy: share of its audios whose nearest image is their own.

    Raises:
        ValueError: when called, if there is one pair in all, or if ranks hold different numbers of pairs.
    """

    def __init__(self, temperature: float = 0.05):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        audio, image = (
            F.normalize((uniform_weights(tokens, mask)[:, None] @ tokens)[:, 0], dim=1)
            for tokens, mask in ((audio, audio_mask), (image, image_mask))
        )
        all_audio, all_image, first = _gather(audio, image)
        if len(all_audio) < 2:
            raise ValueError("audio_tokens holds one sample, which has no negatives; give two or more")
        audio_to_image = audio @ all_image.T / self.temperature
        image_to_audio = image @ all_audio.T / self.temperature
        target = torch.arange(first, first + len(audio), device=audio.device)
        loss = (F.cross_entropy(audio_to_image, target) + F.cross_entropy(image_to_audio, target)) / 2
        accuracy = (audio_to_image.argmax(dim=1) == target).to(loss.dtype).mean()
        names = ("contrastive", "accuracy")
        return LossOutput(loss, dict(zip(names, torch.stack((loss.detach(), accuracy)).tolist(), strict=True)))


def _gather(audio: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All ranks' vectors, in rank order and with gradients, and where this rank's begin."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return audio, image, 0
    # A collective on tensors of different sizes hangs or fills in rubbish.
    size = torch.tensor([len(audio)], device=audio.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    sizes = torch.cat(sizes).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"audio_tokens holds {sizes} samples by rank; give each rank the same number (drop_last)")
    return torch.cat(all_gather(audio)), torch.cat(all_gather(image)), dist.get_rank() * len(audio)
