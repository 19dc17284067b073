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
    # float32 holds costs in [0, 1] whatever their unit was.
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    coarse = ((cost / scale[:, None, None]).float(), a.float(), b.float())
    u, v, strength = anneal(*coarse, eps, num_iterations, None if relative else scale)
    plan = _round_onto(sinkhorn_log_plan(*coarse, strength, u, v).exp().double(), a, b)

    u, v = feasible_potentials(cost, v.double() * scale[:, None], a, b)
    upper = (plan * cost).sum(dim=(1, 2))
    lower = (a * u).sum(dim=1) + (b * v).sum(dim=1)
    return Solution(upper, plan, u, v, (upper - lower).clamp(min=0))


def anneal(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: Sequence[float],
    num_iterations: Sequence[int],
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sinkhorn with falling eps, each starting from the last one's potentials.

    Args:
        cost: (B, N, M) float32.
        a: (B, N) weights; b: (B, M) weights.
        eps: strengths of the entropy, one after the other, in mean costs of the sample.
        num_iterations: how many iterations each eps gets.
        scale: (B,) where eps counts in the costs' own unit, the size of `cost`'s unit in that.

    Returns:
        u (B, N) and v (B, M) in the cost's unit, and the last eps (B,) in that unit.

    Raises:
        ValueError: eps and num_iterations that do not go together, or an eps that is not positive.
    """
    if not eps or len(eps) != len(num_iterations):
        raise ValueError(f"eps and num_iterations must be of one length, not {len(eps)} and {len(num_iterations)}")
    if not all(value > 0 for value in eps):
        raise ValueError(f"eps must be positive, not {tuple(eps)}")
    v = None
    for value, count in zip(eps, num_iterations, strict=True):
        strength = relative_eps(cost, a, b, value) if scale is None else (value / scale).float()
        # A mean that vanishes beside the largest cost would round eps to 0.
        strength = strength.clamp(min=torch.finfo(cost.dtype).tiny)
        u, v = sinkhorn_potentials(cost, a, b, strength, count, v)
    return u, v, strength


def feasible_potentials(
    cost: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """u (B, N) and v (B, M) with `u_i + v_j <= C_ij` wherever one of the two has weight, made from a v (B, M).

    u is the largest that v leaves room for, then v the largest for that u: a lower bound of the optimum.
    """
    u = _c_transform(cost, v, b)
    return u, _c_transform(cost.mT, u, a)


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
