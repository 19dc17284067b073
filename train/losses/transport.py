"""Optimal transport between two sets of tokens (DALI_OT)."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, check_tokens, uniform_weights
from dali_llava.train.transport import TransportProblem, check_solver, pose_transport
from dali_llava.train.transport.background import solve_in_background
from dali_llava.train.transport.parts import in_parts
from dali_llava.train.transport.solution import Solution


@dataclass
class PosedPairs:
    """B pairs before their transport is solved.

    Attributes:
        problem: the transport between their tokens.
        terms: other terms of the loss by name, (B,) each.
    """

    problem: TransportProblem
    terms: dict[str, torch.Tensor]


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

    def over_micro_batches(self, micro_batches: Iterable[tuple[torch.Tensor | None, ...]]) -> LossOutput:
        """Computes the loss of a batch that arrives in parts, and solves each part while the next one is made.

        The value and the gradients are those of `forward` on the whole batch: the pairs are independent, plans carry
        no gradient, and means are taken over all parts at the end.

        Args:
            micro_batches: the arguments of `forward` for each part. A generator that runs the towers computes the next
                part while a thread solves the last one.

        Raises:
            ValueError, TypeError: as in `forward`; the number of a sample counts from the start of its part.
        """
        posed, pending = [], []
        with ThreadPoolExecutor(1) as pool:
            for tokens in micro_batches:
                audio, *others = check_tokens(*tokens)
                with torch.autocast(audio.device.type, enabled=False):
                    posed.append(self.pose(audio, *others))
                pending.append(solve_in_background(pool, posed[-1].problem))
            with torch.autocast(audio.device.type, enabled=False):
                return self._conclude(posed, [future.result for future in pending])

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        posed = self.pose(audio, image, audio_mask, image_mask)
        return self._conclude([posed], [posed.problem.solve])

    def pose(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> PosedPairs:
        """The transport between the tokens of each pair, and its `mean_distance`. Arguments as in `compute`."""
        a, b = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)
        return PosedPairs(self.problem(audio, image, a, b), {"mean_distance": pair_distances(audio, image, a, b)})

    def problem(self, audio: torch.Tensor, image: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> TransportProblem:
        """The transport from audio (B, Na, D) with weights a (B, Na) to image (B, Nv, D) with weights b (B, Nv)."""
        return pose_transport(audio, image, a, b, self.solver, **self.solver_options)

    def combine(self, cost: torch.Tensor, terms: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        """The loss and further logs, from the mean cost and the mean terms of the batch (scalars)."""
        return cost, {}

    def _conclude(self, posed: Sequence[PosedPairs], solutions: Sequence[Callable[[], Solution]]) -> LossOutput:
        if posed[0].problem.x.is_cuda:
            torch.cuda.current_stream(posed[0].problem.x.device).synchronize()
        start = time.perf_counter()
        solved = [solution() for solution in solutions]
        seconds = time.perf_counter() - start

        results = [part.problem.result(solution) for part, solution in zip(posed, solved, strict=True)]
        cost = torch.cat([result.cost for result in results]).mean()
        terms = {name: torch.cat([part.terms[name] for part in posed]).mean() for name in posed[0].terms}
        loss, logs = self.combine(cost, terms)
        gap = torch.cat([result.gap for result in results]).max()
        logs = {"transport_cost": cost, "max_gap": gap} | terms | logs
        values = torch.stack([value.detach().double() for value in logs.values()]).tolist()
        return LossOutput(loss, dict(zip(logs, values, strict=True)) | {"transport_seconds": seconds})


@torch.no_grad()
def pair_distances(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,) `sum_ij a_i b_j |x_i - y_j|^2`, for weights that sum to 1."""
    per_pair = []
    for own_x, own_y, own_a, own_b in in_parts(x.element_size() * (x[0].numel() + y[0].numel()), x, y, a, b):
        means, spreads = [], []
        for weights, points in ((own_a, own_x), (own_b, own_y)):
            mean = weights[:, None] @ points
            means.append(mean)
            spreads.append((weights * (points - mean).square().sum(dim=2)).sum(dim=1))
        per_pair.append(sum(spreads) + (means[0] - means[1]).square().sum(dim=(1, 2)))
    return torch.cat(per_pair)
