"""Approximate transport by annealed Sinkhorn iterations, with a bound of its error."""

from collections.abc import Sequence

import torch

from dali_llava.modeling.sinkhorn import relative_eps, sinkhorn_log_plan, sinkhorn_potentials
from dali_llava.train.transport.costs import cost_scale
from dali_llava.train.transport.solution import Solution


def solve_sinkhorn(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: Sequence[float] = (0.1, 0.03, 0.01),
    num_iterations: Sequence[int] = (20, 20, 40),
    relative: bool = True,
) -> Solution:
    """Runs Sinkhorn [1] in float32 with falling eps, then makes the plan and the potentials feasible in float64.

    The plan is rounded onto the marginals [2]. Its cost, which is returned, bounds the optimum from above. The
    c-transforms of the potentials [3] bound it from below.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1.
        b: (B, M) float64 weights, each row summing to 1.
        eps: entropy strengths, used in turn.
        num_iterations: number of iterations for each eps.
        relative: whether eps is in mean costs of the sample; otherwise it is in the unit of the costs.

    Returns:
        Solution with a dense plan. `gap` is the cost minus the lower bound from the potentials.

    Raises:
        ValueError: eps and num_iterations differ in length, or an eps is not positive.

    References:
        [1] M. Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS, 2013, algorithm 1.
        [2] J. Altschuler, J. Weed and P. Rigollet, "Near-linear Time Approximation Algorithms for Optimal Transport
            via Sinkhorn Iteration", NeurIPS, 2017, algorithm 2.
        [3] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 3.2.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[[0.0, 4.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> solution = solve_sinkhorn(cost, weights, weights)
        >>> bool(solution.cost - solution.gap <= 0.5 <= solution.cost)
        True
    """
    # Costs in [0, 1] fit float32 in any unit.
    scale = cost_scale(cost)
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
    """Runs Sinkhorn with falling eps, each from the potentials of the previous one.

    Args:
        cost: (B, N, M) float32.
        a: (B, N) weights; b: (B, M) weights.
        eps: entropy strengths, used in turn, in mean costs of the sample or, with `scale`, in the original unit.
        num_iterations: number of iterations for each eps.
        scale: (B,) what one unit of `cost` is in the original unit.

    Returns:
        u (B, N), v (B, M) and the last eps (B,), in the unit of `cost`.

    Raises:
        ValueError: eps and num_iterations differ in length, or an eps is not positive.
    """
    check_schedule(eps, num_iterations)
    v = None
    for value, count in zip(eps, num_iterations, strict=True):
        strength = relative_eps(cost, a, b, value) if scale is None else (value / scale).float()
        # If the mean is tiny beside the largest cost, eps would round to 0.
        strength = strength.clamp(min=torch.finfo(cost.dtype).tiny)
        u, v = sinkhorn_potentials(cost, a, b, strength, count, v)
    return u, v, strength


def check_schedule(eps: Sequence[float], num_iterations: Sequence[int]) -> None:
    """Raises ValueError unless there is one number of iterations for each eps, and all eps are positive."""
    if not eps or len(eps) != len(num_iterations):
        raise ValueError(f"eps and num_iterations must be of one length, not {len(eps)} and {len(num_iterations)}")
    if not all(value > 0 for value in eps):
        raise ValueError(f"eps must be positive, not {tuple(eps)}")


def feasible_potentials(
    cost: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feasible potentials from any v (B, M), by c-transforms. Their value is a lower bound of the optimum.

    Returns:
        u (B, N), the largest that v allows, and v (B, M), the largest that this u allows: `u_i + v_j <= C_ij` wherever
        one of the two points has weight.
    """
    u = _c_transform(cost, v, b)
    return u, _c_transform(cost.mT, u, a)


def _c_transform(cost: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N) largest row potentials that v (B, M) allows, over the columns of positive weight."""
    return (cost - v.masked_fill(b == 0, -torch.inf)[:, None]).amin(dim=2)


def _round_onto(plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A plan with marginals a and b, from a plan whose marginals are near them."""
    plan = plan * _shrink(a, plan.sum(dim=2))[..., None]
    plan = plan * _shrink(b, plan.sum(dim=1))[:, None]
    missing_a, missing_b = a - plan.sum(dim=2), b - plan.sum(dim=1)
    missing = missing_a.sum(dim=1).clamp(min=torch.finfo(plan.dtype).tiny)
    return plan + (missing_a / missing[:, None]).clamp(min=0)[..., None] * missing_b.clamp(min=0)[:, None]


def _shrink(wanted: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Factors that reduce the masses `present` to those `wanted`, where they exceed them."""
    return torch.where(present > wanted, wanted / present, 1.0)
