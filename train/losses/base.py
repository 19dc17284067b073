"""The base of the losses between audio and image tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dali_llava.train.transport.checks import check_point_sets


@dataclass
class LossOutput:
    """A loss and its logs.

    Attributes:
        loss: scalar tensor, float32 or float64.
        logs: numbers by name.
    """

    loss: torch.Tensor
    logs: dict[str, float] = field(default_factory=dict)


class AlignmentLoss(nn.Module):
    """Base of the losses that compare each sample's audio tokens with its image tokens.

    A subclass implements `compute`. It receives checked tensors of one dtype, float32 or float64, with autocast off
    and masked tokens set to zero. A subclass whose constructor needs something of the captioner, such as the width of
    its tokens, overrides `from_captioner`. A subclass with a schedule has a method `set_epoch(epoch)`, which the
    trainer calls before each step with the epoch, counted from 1.

    The parameters of a loss are trained with the audio tower. Each must receive a gradient in every step, zero if
    need be, because `DistributedDataParallel` waits for all of them. ZeRO-3 and FSDP2 gather a parameter for the
    forward pass of its module and for nothing else. FSDP2 does not accept scalar parameters; use one of shape (1,).
    """

    @classmethod
    def from_captioner(cls, captioner: PreTrainedModel, **options: Any) -> "AlignmentLoss":
        """Builds the loss for a captioner.

        The alignment calls this twice: once with towers on the meta device, to check the options before weights are
        loaded, and once with the loaded towers.

        Args:
            captioner: a model with `config`, `vision_tower` and `audio_tower`, such as `LlavaAudioTowers`.
            options: arguments of the constructor.

        Raises:
            ValueError: an option has a value that the loss cannot use.
        """
        return cls(**options)

    def forward(
        self,
        audio_tokens: torch.Tensor,
        image_tokens: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> LossOutput:
        """Computes the loss of a batch of pairs.

        Args:
            audio_tokens: (B, Na, D), any floating-point dtype; half precision is computed in float32.
            image_tokens: (B, Nv, D).
            audio_mask: (B, Na) bool, True for tokens that count; all by default. Other tokens are ignored.
            image_mask: (B, Nv) bool, likewise.

        Raises:
            ValueError: shapes that do not match, a NaN or infinity, a sample without tokens; the message names the
                argument and the sample.
            TypeError: an argument is not a tensor of the right kind.
        """
        tokens = check_tokens(audio_tokens, image_tokens, audio_mask, image_mask)
        with torch.autocast(tokens[0].device.type, enabled=False):
            return self.compute(*tokens)

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        """The loss of checked arguments; see `forward`."""
        raise NotImplementedError


def check_tokens(
    audio_tokens: torch.Tensor,
    image_tokens: torch.Tensor,
    audio_mask: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The arguments of `AlignmentLoss.compute` from those of `AlignmentLoss.forward`, whose errors it raises."""
    check_point_sets(
        audio_tokens,
        image_tokens,
        audio_mask,
        image_mask,
        names=("audio_tokens", "image_tokens"),
        mask_names=("audio_mask", "image_mask"),
    )
    dtype = torch.promote_types(torch.promote_types(audio_tokens.dtype, image_tokens.dtype), torch.float32)
    audio, image = _masked(audio_tokens.to(dtype), audio_mask), _masked(image_tokens.to(dtype), image_mask)
    return audio, image, audio_mask, image_mask


def uniform_weights(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, N) weights for tokens (B, N, D): equal over the tokens that count, zero elsewhere, each row summing to 1."""
    if mask is None:
        return tokens.new_full(tokens.shape[:2], 1.0 / tokens.shape[1])
    counted = mask.to(tokens.dtype)
    return counted / counted.sum(dim=1, keepdim=True)


def _masked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0.0)
