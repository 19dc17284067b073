"""What the losses between audio and image tokens have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from dali_llava.train.transport.checks import check_point_sets


@dataclass
class LossOutput:
    """A loss and what to write down about it.

    Attributes:
        loss: scalar tensor, float32 or float64.
        logs: plain numbers by name, detached.
    """

    loss: torch.Tensor
    logs: dict[str, float] = field(default_factory=dict)


class PendingLossOutput(LossOutput):
    """A loss that is still being computed: who first reads `loss` or `logs` waits for it.

    Args:
        finish: waits, and gives the output.
    """

    def __init__(self, finish: Callable[[], LossOutput]):
        self._finish = finish

    @cached_property
    def _output(self) -> LossOutput:
        return self._finish()

    @property
    def loss(self) -> torch.Tensor:
        return self._output.loss

    @property
    def logs(self) -> dict[str, float]:
        return self._output.logs


class AlignmentLoss(nn.Module):
    """Base of the losses that compare each sample's audio tokens with its image tokens.

    A subclass writes `compute`; it gets checked tensors of one dtype, float32 or float64, with autocast off, and
    masked tokens set to zero.
    """

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
            audio_mask: (B, Na) bool, True for tokens that count; all of them by default. A masked token is as good as
                removed.
            image_mask: (B, Nv) bool, likewise.

        Raises:
            ValueError: shapes that do not match, a NaN or infinity, a sample without tokens; the message names the
                argument and the sample.
            TypeError: an argument that is no tensor of the right kind.
        """
        check_point_sets(
            audio_tokens,
            image_tokens,
            audio_mask,
            image_mask,
            names=("audio_tokens", "image_tokens"),
            mask_names=("audio_mask", "image_mask"),
        )
        dtype = torch.promote_types(torch.promote_types(audio_tokens.dtype, image_tokens.dtype), torch.float32)
        with torch.autocast(audio_tokens.device.type, enabled=False):
            audio = _masked(audio_tokens.to(dtype), audio_mask)
            image = _masked(image_tokens.to(dtype), image_mask)
            return self.compute(audio, image, audio_mask, image_mask)

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        """The loss itself. Arguments as in `forward`, checked."""
        raise NotImplementedError


def uniform_weights(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, N) weights for tokens (B, N, D): equal over the tokens that count, zero elsewhere, each row summing to 1."""
    if mask is None:
        return tokens.new_full(tokens.shape[:2], 1.0 / tokens.shape[1])
    counted = mask.to(tokens.dtype)
    return counted / counted.sum(dim=1, keepdim=True)


def _masked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0.0)
