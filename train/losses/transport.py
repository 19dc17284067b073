"""Optimal transport between two sets of tokens (DALI_OT)."""

from typing import Any

import torch

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights
from dali_llava.train.transport import TransportResult, check_solver, solve_transport
from dali_llava.train.transport.parts import in_parts


class TransportLoss(AlignmentLoss):
    """Cost of moving the audio tokens of each pair onto its image tokens, averaged over the batch [1, equation 4].

    The cost is `min <P, C>` over plans P with uniform marginals, where `C_ij = |x_i - y_j|^2`. The solvers "partial"
    and "unbalanced" relax the marginals; see `solve_transport`.

    Args:
        solver: solver of `solve_transport`.
        solver_options: options of the solver.

    Logs:
        transport_cost: the loss. mean_distance: the mean of C. max_gap: the largest gap of `solve_transport`, which
        bounds how far a cost lies above its optimum.

    References:
        [1] H. Malard et al., "An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using
        Audiovisual Distribution Alignment", 2024.

    Example:
        >>> import torch
        >>> audio = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
        >>> output = TransportLoss()(audio, torch.tensor([[[2.0], [3.0]]]))
        >>> output.loss.item(), output.logs["mean_distance"]
        (4.0, 4.5)
        >>> output.loss.backward()
        >>> audio.grad[0, :, 0]
        tensor([-2., -2.])
    """

    def __init__(self, solver: str = "exact", solver_options: dict[str, Any] | None = None):
        super().__init__()
        check_solver(solver)
        self.solver = solver
        self.solver_options = solver_options or {}

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        a, b = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)

        result = self.transport(audio, image, a, b)
        loss = result.cost.mean()
        distance = mean_distance(audio, image, a, b)
        names = ("transport_cost", "mean_distance", "max_gap")
        values = torch.stack([value.double() for value in (loss.detach(), distance, result.gap.max())])
        return LossOutput(loss, dict(zip(names, values.tolist(), strict=True)))

    def transport(self, audio: torch.Tensor, image: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> TransportResult:
        """The transport from audio (B, Na, D) with weights a (B, Na) to image (B, Nv, D) with weights b (B, Nv)."""
        return solve_transport(audio, image, a, b, self.solver, **self.solver_options)


@torch.no_grad()
def mean_distance(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar mean over the batch of `sum_ij a_i b_j |x_i - y_j|^2`, for weights that sum to 1."""
    per_pair = []
    for own_x, own_y, own_a, own_b in in_parts(x.element_size() * (x[0].numel() + y[0].numel()), x, y, a, b):
        means, spreads = [], []
        for weights, points in ((own_a, own_x), (own_b, own_y)):
            mean = weights[:, None] @ points
            means.append(mean)
            spreads.append((weights * (points - mean).square().sum(dim=2)).sum(dim=1))
        per_pair.append(sum(spreads) + (means[0] - means[1]).square().sum(dim=(1, 2)))
    return torch.cat(per_pair).mean()
