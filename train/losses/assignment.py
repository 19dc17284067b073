"""Token-level contrast through an optimal assignment (LAVCap's OT loss)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dali_llava.modeling.sinkhorn import log_assignment
from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights


_INITIAL_SCALE = 1 / 0.07
_LARGEST_SCALE = 100.0


class TokenAssignmentLoss(AlignmentLoss):
    """InfoNCE within a sample, between a token's assignment and its similarities (LAVCap, equation 4).

    With tokens of unit length, `S = x y^T` and `Q = argmax <Q, S> + eps H(Q)` without gradient: the rows q_i and s_i
    stand for audio token i, the columns for image tokens, and each modality's term is the mean over i of
    `-log softmax_j(<q_i, s_j> / tau)` at j = i. The paper sums over tokens; a mean does not depend on their number.
    The terms of both modalities are added, and samples averaged.

    Args:
        variant: "paper", as above, with 1/tau learnt from 1/0.07 as an exponential and held in [1, 100]; or
            "reference", what the authors' program does: log Q stands for Q, the softmax runs over q's index instead of
            s's, and the logits are multiplied by a learnt number that starts at ln(1/0.07) and is held in [0, ln 100].
        eps: entropy of the assignment.
        num_iterations: Sinkhorn iterations.

    Logs:
        assignment: the loss. scale: what multiplies the logits.
    """

    def __init__(self, variant: str = "paper", eps: float = 0.1, num_iterations: int = 50):
        super().__init__()
        if variant not in ("paper", "reference"):
            raise ValueError(f"unknown variant {variant!r}; known are 'paper', 'reference'")
        if not eps > 0 or num_iterations < 1:
            raise ValueError(f"eps and num_iterations must be positive, not {eps} and {num_iterations}")
        self.variant = variant
        self.eps = eps
        self.num_iterations = num_iterations
        self.log_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_SCALE)))

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        # The parameter itself is held: a clamped copy would have no gradient to come back with.
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(_LARGEST_SCALE))
        log_scale = self.log_scale.to(audio.dtype)
        scale = log_scale.exp() if self.variant == "paper" else log_scale

        similarity = F.normalize(audio, dim=2) @ F.normalize(image, dim=2).mT
        assignment = log_assignment(
            similarity.detach(),
            uniform_weights(audio, audio_mask),
            uniform_weights(image, image_mask),
            self.eps,
            self.num_iterations,
        )
        if self.variant == "paper":
            assignment = assignment.exp()
        else:
            # Masked tokens: their similarity is 0, but 0 times -inf is not.
            assignment = assignment.masked_fill(assignment == -torch.inf, 0.0)
        by_audio = scale * assignment @ similarity.mT
        by_image = scale * assignment.mT @ similarity
        if self.variant == "reference":
            by_audio, by_image = by_audio.mT, by_image.mT
        loss = (_token_infonce(by_audio, audio_mask) + _token_infonce(by_image, image_mask)).mean()
        logs = torch.stack((loss, scale)).detach().tolist()
        return LossOutput(loss, dict(zip(("assignment", "scale"), logs, strict=True)))


def _token_infonce(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B,) mean over tokens of the cross-entropy of logits (B, N, N) against the diagonal."""
    if mask is None:
        return (logits.logsumexp(dim=2) - logits.diagonal(dim1=1, dim2=2)).mean(dim=1)
    logits = logits.masked_fill(~mask[:, None], -torch.inf)
    per_token = logits.logsumexp(dim=2) - logits.diagonal(dim1=1, dim2=2)
    return per_token.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)
