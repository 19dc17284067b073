"""Approximate transport: annealed Sinkhorn, with bounds that say how far off it is."""

from collections.abc import Sequence

import torch

from dali_llava.modeling.sinkhorn import relative_eps, sinkhorn_log_plan, sinkhorn_potentials
from dali_llava.train.transport.solution import Solution


def solve_sinkhorn(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: Sequence[float] = (0.1, 0.03, 0.01),
    num_iterations: Sequence[int] = (20, 20, 40),
    relative: bool = True,
) -> Solution:
    """Sinkhorn in float32 with falling eps, then a feasible plan and feasible potentials in float64.

    The plan is rounded onto the marginals (Altschuler et al., 2017, algorithm 2): its cost, which is the one returned,
    bounds the optimum from above. The potentials' c-transforms bound it from below.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1.
        b: (B, M) float64 weights, likewise.
        eps: strengths of the entropy, one after the other.
        num_iterations: how many iterations each eps gets.
        relative: eps counts in mean costs of the sample; otherwise in the cost's own unit.
    """
    if not eps or len(eps) != len(num_iterations):
        raise ValueError(f"eps and num_iterations must be of one length, not {len(eps)} and {len(num_iterations)}")
    if not all(value > 0 for value in eps):
        raise ValueError(f"eps must be positive, not {tuple(eps)}")
    # float32 holds costs in [0, 1] whatever their unit was.
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    coarse = ((cost / scale[:, None, None]).float(), a.float(), b.float())
    v = None
    for value, count in zip(eps, num_iterations, strict=True):
        strength = relative_eps(*coarse, value) if relative else (value / scale).float()
        u, v = sinkhorn_potentials(*coarse, strength, count, v)
    plan = _round_onto(sinkhorn_log_plan(*coarse, strength, u, v).exp().double(), a, b)

    v = v.double() * scale[:, None]
    u = _c_transform(cost, v, b)
    v = _c_transform(cost.mT, u, a)
    upper = (plan * cost).sum(dim=(1, 2))
    lower = (a * u).sum(dim=1) + (b * v).sum(dim=1)
    return Solution(upper, plan, u, v, (upper - lower).clamp(min=0))


def _c_transform(cost: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N) largest row potentials that v (B, M) leaves room for, over the columns that hold weight."""
    return (cost - v.masked_fill(b == 0, -torch.inf)[:, None]).amin(dim=2)


def _round_onto(plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The plan with marginals a and b that is made from one with roughly these."""
    plan = plan * _shrink(a, plan.sum(dim=2))[..., None]
    plan = plan * _shrink(b, plan.sum(dim=1))[:, None]
    missing_a, missing_b = a - plan.sum(dim=2), b - plan.sum(dim=1)
    missing = missing_a.sum(dim=1).clamp(min=torch.finfo(plan.dtype).tiny)
    return plan + (missing_a / missing[:, None]).clamp(min=0)[..., None] * missing_b.clamp(min=0)[:, None]


def _shrink(wanted: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return torch.where(present > wanted, wanted / present, 1.0)
