"""The tokens of the samples of a batch, as a fusion takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput


@dataclass
class FusionInputs(ModelOutput):
    """
    The encoders' tokens of S samples, padded at the end with zeros, in the order of the arguments of a loss.

    Attributes:
        audio_tokens, image_tokens: (S, Na, D) and (S, Nv, D).
        audio_mask, image_mask: (S, Na) and (S, Nv), True for tokens; a sample without a modality has no True.
    """

    audio_tokens: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    audio_mask: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None

    @classmethod
    def from_samples(cls, audio: Sequence[torch.Tensor], image: Sequence[torch.Tensor]) -> "FusionInputs":
        """Pad the tokens of each sample, (tokens, D)."""
        audio_tokens, audio_mask = pad_tokens(audio)
        image_tokens, image_mask = pad_tokens(image)
        return cls(audio_tokens, image_tokens, audio_mask, image_mask)

    def with_both(self) -> "FusionInputs | None":
        """The samples with tokens of both modalities; None if there are none."""
        both = self.audio_mask.any(dim=1) & self.image_mask.any(dim=1)
        return FusionInputs(*(tensor[both] for tensor in self.to_tuple())) if both.any() else None


def pad_tokens(samples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad S samples of (tokens, D) to (S, N, D) with zeros at the end, N at least 1, and return the mask (S, N)."""
    lengths = torch.tensor([len(tokens) for tokens in samples], device=samples[0].device)
    longest = max(1, *map(len, samples))
    tokens = torch.stack([F.pad(tokens, (0, 0, 0, longest - len(tokens))) for tokens in samples])
    return tokens, torch.arange(longest, device=lengths.device) < lengths[:, None]


def split_by_sample(media: Sequence[torch.Tensor], placeholders: list[int], name: str) -> list[list[torch.Tensor]]:
    """
    Assign media to the samples whose placeholders they fill.

    Args:
        media: the tokens of each image or clip, (tokens, D), in the order of the batch.
        placeholders: number of placeholders of each sample.
        name: name of the modality in errors.

    Returns:
        The media of each sample.

    Raises:
        ValueError: the number of placeholders differs from the number of tokens, in the batch or in a sample.
    """
    given = sum(map(len, media))
    if sum(placeholders) != given:
        raise ValueError(
            f"the text contains {sum(placeholders)} {name} placeholders for {given} {name} tokens; use the processor "
            "to write the placeholders."
        )
    samples, rest = [], list(media)
    for row, count in enumerate(placeholders):
        own = []
        while count > 0:
            own.append(rest.pop(0))
            count -= len(own[-1])
        if count < 0:
            raise ValueError(
                f"sample {row} contains {placeholders[row]} {name} placeholders for {sum(map(len, own))} {name} "
                "tokens; use the processor to write the placeholders."
            )
        samples.append(own)
    return samples


def group_by_sample(
    images: Sequence[torch.Tensor],
    clips: Sequence[torch.Tensor],
    image_mask: torch.Tensor,
    audio_mask: torch.Tensor,
    images_alone: bool,
) -> tuple[list[torch.Tensor], FusionInputs | None, torch.Tensor]:
    """
    Group the tokens of a batch by sample.

    Args:
        images, clips: the tokens of each image and of each clip, (tokens, D), in the order of their placeholders.
        image_mask, audio_mask: (B, L), True at the placeholders.
        images_alone: whether samples with images and no audio are not fused.

    Returns:
        The images of the samples that are not fused; the inputs of the fusion, None if no sample is fused; and (B,),
        True for the fused samples.

    Raises:
        ValueError: as in `split_by_sample`, or a sample has images and several clips.
    """
    by_sample = list(
        zip(
            split_by_sample(images, image_mask.sum(dim=1).tolist(), "image"),
            split_by_sample(clips, audio_mask.sum(dim=1).tolist(), "audio"),
            strict=True,
        )
    )
    for row, (own_images, own_clips) in enumerate(by_sample):
        if own_images and len(own_clips) > 1:
            raise ValueError(
                f"sample {row} has images and {len(own_clips)} clips; a fusion takes one clip per sample with images."
            )
    is_fused = [bool(own_clips) or bool(own_images) and not images_alone for own_images, own_clips in by_sample]
    samples = [own for own, fused in zip(by_sample, is_fused, strict=True) if fused]
    alone = [image for (own, _), fused in zip(by_sample, is_fused, strict=True) if not fused for image in own]
    inputs = None
    if samples:
        # Detached, so that the fusion has as many outputs with a gradient as with images, whose tower is frozen.
        no_audio, no_image = (clips or images)[0][:0], (images or clips)[0][:0].detach()
        inputs = FusionInputs.from_samples(
            [torch.cat([no_audio, *own_clips]) for _, own_clips in samples],
            [torch.cat([no_image, *own_images]) for own_images, _ in samples],
        )
    return alone, inputs, torch.tensor(is_fused, device=image_mask.device)


__all__ = ["FusionInputs", "group_by_sample", "split_by_sample"]
