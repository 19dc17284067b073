"""Optimal transport between two token clouds (DALI_OT)."""

from collections.abc import Callable
from typing import Any

import torch

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, PendingLossOutput, uniform_weights
from dali_llava.train.transport import TransportResult, check_solver, solve_transport, start_transport
from dali_llava.train.transport.parts import in_parts


class TransportLoss(AlignmentLoss):
    """Cost of moving each pair's audio tokens onto its image tokens, averaged over the batch (DALI, stage 1b).

    `min <P, C>` over plans P with uniform marginals, `C_ij = |x_i - y_j|^2`; with the solvers "partial" and
    "unbalanced", their cost, and no marginals that must be met.

    Args:
        solver: one of `solve_transport`'s.
        solver_options: passed on to it.
        overlap: whether the solver works in the background until `.loss` or `.logs` is read. Read it last, and other
            losses' forward and, where they take it first, backward passes hide the solver's time. The loss and its
            gradients are the same bit for bit.

    Logs:
        transport_cost: the loss. mean_distance: the mean of all C. max_gap: how far the worst pair's cost may lie
        above its optimum.
    """

    def __init__(self, solver: str = "exact", solver_options: dict[str, Any] | None = None, overlap: bool = False):
        super().__init__()
        check_solver(solver)
        self.solver = solver
        self.solver_options = solver_options or {}
        self.overlap = overlap

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        a, b = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)

        def finish(result: TransportResult) -> LossOutput:
            loss = result.cost.mean()
            distance = mean_distance(audio, image, a, b)
            names = ("transport_cost", "mean_distance", "max_gap")
            values = torch.stack([value.double() for value in (loss.detach(), distance, result.gap.max())])
            return LossOutput(loss, dict(zip(names, values.tolist(), strict=True)))

        return self.transport(audio, image, a, b, finish)

    def transport(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        finish: Callable[[TransportResult], LossOutput],
    ) -> LossOutput:
        """What `finish` makes of the transport from audio (B, Na, D) with weights a to image (B, Nv, D) with b."""
        arguments = (audio, image, a, b, self.solver)
        if not self.overlap:
            return finish(solve_transport(*arguments, **self.solver_options))
        wait = start_transport(*arguments, **self.solver_options)

        def finish_later() -> LossOutput:
            with torch.autocast(audio.device.type, enabled=False):
                return finish(wait())

        return PendingLossOutput(finish_later)


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
