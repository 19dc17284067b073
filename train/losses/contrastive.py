"""Contrastive learning on mean tokens, DALI's baseline."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights


class ContrastiveLoss(AlignmentLoss):
    """Symmetric InfoNCE between mean tokens, on cosine similarities (the baseline of [1]).

    The cross-entropy [2, equation 4] of finding the image of an audio clip in the batch, averaged with that of finding
    the audio clip of an image. With `torch.distributed`, the negatives come from all ranks. Each rank's loss covers
    its own pairs, so the mean of the ranks' losses, with gradients averaged by DistributedDataParallel, is the loss of
    the whole batch.

    Args:
        temperature: divides the cosine similarities.

    Logs:
        contrastive: the loss of this rank. accuracy: share of its audio clips whose nearest image is their own.

    Raises:
        ValueError: when called with one pair in all, or with different numbers of pairs on the ranks.

    References:
        [1] H. Malard et al., "An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using
        Audiovisual Distribution Alignment", 2024.
        [2] A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018.

    Example:
        >>> import torch
        >>> image = torch.eye(2)[:, None]
        >>> output = ContrastiveLoss(temperature=1.0)(image.flip(0), image)  # each audio clip has the other image
        >>> round(output.loss.item(), 4), output.logs["accuracy"]  # log(1 + e)
        (1.3133, 0.0)
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
    """The vectors of all ranks, in rank order and with gradients, and the index of the first one of this rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return audio, image, 0
    # A collective on tensors of different sizes hangs or returns wrong values.
    size = torch.tensor([len(audio)], device=audio.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    sizes = torch.cat(sizes).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"audio_tokens holds {sizes} samples by rank; give each rank the same number (drop_last)")
    return torch.cat(all_gather(audio)), torch.cat(all_gather(image)), dist.get_rank() * len(audio)
