"""Token-level contrast with an optimal assignment (the OT loss of LAVCap)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dali_llava.modeling.sinkhorn import log_assignment
from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights


_INITIAL_SCALE = 1 / 0.07
_LARGEST_SCALE = 100.0
_IGNORED = -100


class TokenAssignmentLoss(AlignmentLoss):
    """InfoNCE within a sample, between the assignment of a token and its similarities [1, equation 4].

    For tokens of unit length, `S = x y^T`, and `Q = argmax <Q, S> + eps H(Q)` [1, equation 2] without gradient. The
    rows q_i and s_i belong to audio token i and the columns to image tokens. The term of a modality is the mean over i
    of `-log softmax_j(<q_i, s_j> / tau)` at j = i; the paper sums over the tokens, but a mean does not depend on their
    number. The loss adds the terms of both modalities and averages the samples. The temperature is learned.

    A row of Q sums to 1/N, so the logits of "paper" are at most 1/(N tau) and their slope is small: perfectly matched
    tokens, 64 of each modality, have a loss of 7.88 at the start, where equal tokens have 8.32. `rescale` gives the
    rows a sum of 1.

    Args:
        variant: "paper", as above, with 1/tau = exp(`log_scale`), which starts at 1/0.07 and is clamped to [1, 100].
            "reference" is what the authors' code computes: log Q in place of Q, a softmax over the index of q in place
            of that of s, and logits multiplied by `log_scale` itself, clamped to [0, ln 100].
        rescale: whether to multiply each q_i by the number of tokens of its modality. Only for "paper".
        eps: weight of the entropy in the assignment.
        num_iterations: number of Sinkhorn iterations.

    Logs:
        assignment: the loss. scale: the factor of the logits.

    References:
        [1] K. Rho, H. Lee, V. Iverson, J. S. Chung, "LAVCap: LLM-based Audio-Visual Captioning using Optimal
        Transport", 2025.

    Example:
        >>> import torch
        >>> tokens = torch.ones(1, 4, 3)  # equal tokens cannot be told apart: log(4) for each modality
        >>> output = TokenAssignmentLoss()(tokens, tokens)
        >>> round(output.loss.item(), 4), round(output.logs["scale"], 4)
        (2.7726, 14.2857)
    """

    def __init__(self, variant: str = "paper", rescale: bool = False, eps: float = 0.1, num_iterations: int = 50):
        super().__init__()
        if variant not in ("paper", "reference"):
            raise ValueError(f"unknown variant {variant!r}; known are 'paper', 'reference'")
        if not eps > 0 or num_iterations < 1:
            raise ValueError(f"eps and num_iterations must be positive, not {eps} and {num_iterations}")
        if rescale and variant != "paper":
            raise ValueError(
                f"rescale needs the variant 'paper': {variant!r} has log Q, whose rows have no sum of 1/N"
            )
        self.variant = variant
        self.rescale = rescale
        self.eps = eps
        self.num_iterations = num_iterations
        self.log_scale = nn.Parameter(torch.full((1,), math.log(_INITIAL_SCALE)))  # FSDP2 does not accept scalars

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        log_scale = _Clamp.apply(self.log_scale[0].to(audio.dtype), 0.0, math.log(_LARGEST_SCALE))
        scale = log_scale.exp() if self.variant == "paper" else log_scale

        similarity = F.normalize(audio, dim=2) @ F.normalize(image, dim=2).mT
        audio_weights, image_weights = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)
        log_q = log_assignment(similarity.detach(), audio_weights, image_weights, self.eps, self.num_iterations)
        # The similarity of masked tokens is 0, but 0 times log 0 is NaN.
        assignment = log_q.exp() if self.variant == "paper" else log_q.masked_fill(log_q == -torch.inf, 0.0)
        by_audio, by_image = assignment @ similarity.mT, assignment.mT @ similarity
        if self.rescale:
            by_audio = by_audio / audio_weights.amax(dim=1)[:, None, None]
            by_image = by_image / image_weights.amax(dim=1)[:, None, None]
        if self.variant == "reference":
            by_audio, by_image = by_audio.mT, by_image.mT
        loss = _token_infonce(scale * by_audio, audio_mask) + _token_infonce(scale * by_image, image_mask)
        loss = loss.mean().to(audio.dtype)
        logs = torch.stack((loss, scale)).detach().tolist()
        return LossOutput(loss, dict(zip(("assignment", "scale"), logs, strict=True)))


class _Clamp(torch.autograd.Function):
    """
    Clamps a tensor. At a bound, the gradient passes if descent leads back into the range, and is 0 otherwise.

    The parameter itself is not changed, because engines may train a copy of it.
    """

    @staticmethod
    def forward(ctx, value: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = lowest, highest
        return value.clamp(lowest, highest)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (value,), (lowest, highest) = ctx.saved_tensors, ctx.bounds
        outward = (value <= lowest) & (gradient > 0) | (value >= highest) & (gradient < 0)
        return gradient.masked_fill(outward, 0.0), None, None


def _token_infonce(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B,) mean over tokens of the cross-entropy of logits (B, N, N) against the diagonal, in float64.

    The gradient at the diagonal is `softmax - 1`, which float32 would round to 0 if the softmax is nearly 1.
    """
    logits = logits.double()
    target = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    if mask is None:
        return F.cross_entropy(logits.mT, target, reduction="none").mean(dim=1)
    logits = logits.masked_fill(~mask[:, None], -torch.inf)
    target = target.masked_fill(~mask, _IGNORED)
    per_token = F.cross_entropy(logits.mT, target, reduction="none", ignore_index=_IGNORED)
    return per_token.sum(dim=1) / mask.sum(dim=1)
