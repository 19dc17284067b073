"""Rounding in the certificate of a solution, and a second, more accurate solution where it matters."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dali_llava.train.transport.costs import UNIT, Costs, direct_costs
from dali_llava.train.transport.sinkhorn import feasible_potentials
from dali_llava.train.transport.solution import Solution, merge_solutions


# A gap of at most this share of the cost is reported as 0: the optimum is proven to twelve digits.
_PROVEN = 1e-12
# A larger share than this leads to a second solution. It lies above what the solvers accept as a proof.
_COARSE = 1e-9
# Up to this many products of coordinates, N M D, direct costs take no noticeable time.
_SMALL = 2**20
# Costs are capped at this many times a typical smallest cost, then at this many times more.
_CAP_FACTOR = 1e3

Solver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Solution]


def rounding_bound(solution: Solution, costs: Costs, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,) bound of what rounding adds to the distance between a solution's upper and lower bound.

    It counts the errors of the costs in both bounds, the errors of the sums that give the cost of the plan and the
    value of the potentials, and what it costs to repair a plan whose marginals differ from the weights.

    Args:
        solution: without gap, B problems.
        costs: of the same problems.
        a: (B, N) weights; b: (B, M) weights, in float64.
    """
    balanced = solution.row_mass is None
    rows, columns = _marginals(solution.plan) if balanced else (solution.row_mass, solution.column_mass)
    # The optimal plan of a problem without fixed marginals is known up to the gap only, hence twice.
    times = 1 if balanced else 2
    bound = 2 * costs.relative_error * solution.cost
    terms = solution.cost
    for weights, mass, error, norms, potential in (
        (a, rows, costs.row_error, costs.row_norms, solution.u),
        (b, columns, costs.column_error, costs.column_norms, solution.v),
    ):
        bound = bound + times * ((weights + mass) * error).sum(dim=1)
        terms = terms + (weights * potential.abs()).sum(dim=1)
        if balanced:
            # Weights are rounded to float64 themselves. |x - y|^2 <= 2 |x|^2 + 2 |y|^2 bounds the cost of the rest.
            missing = ((weights - mass).abs() - 4 * UNIT * weights).clamp(min=0)
            bound = bound + 2 * (missing * norms).sum(dim=1)
    return bound + (sum(costs.values.shape[1:]) + 8) * UNIT * terms


def certify(
    solve: Solver, proves: bool, x: torch.Tensor, y: torch.Tensor, costs: Costs, a: torch.Tensor, b: torch.Tensor
) -> Solution:
    """Solves problems, includes rounding in `gap`, and solves those again that rounding leaves with too few digits.

    The second time, costs come from the differences of all points. Of a solver that proves its optimum, they are also
    capped: a simplex has absolute tolerances, so that one far point would hide the differences between the others. A
    plan that uses no capped cost is optimal without the cap too, and whatever the plan, potentials that are feasible
    with capped costs are feasible without.

    Args:
        solve: takes costs (B, N, M) and weights a and b.
        proves: whether the solver finds an optimum and proves it.
        x: (B, N, D) points.
        y: (B, M, D) points.
        costs: of these points.
        a: (B, N) weights; b: (B, M) weights, in float64.
    """
    first = solve(costs.values, a, b)
    rounding = rounding_bound(first, costs, a, b)
    first.gap = first.gap + rounding
    # Points that keep their mass add to the bound but not to the cost, where marginals are not fixed.
    small = first.row_mass is not None and x[0].numel() * y.shape[1] <= _SMALL
    coarse = (first.gap if proves else rounding) > (_PROVEN if small else _COARSE) * first.cost
    again = coarse.nonzero()[:, 0]
    better, samples = [], []
    for sample in again.tolist():
        one = slice(sample, sample + 1)
        own = direct_costs(x[one], y[one])
        second = _solve_capped(solve, proves, own, a[one], b[one])
        if second is not None and not second.gap >= first.gap[one]:
            better.append(second)
            samples.append(sample)
    solution = merge_solutions(first, samples, better) if samples else first
    proven = solution.gap <= _PROVEN * solution.cost
    gap = torch.where(proven, torch.zeros_like(solution.gap), solution.gap)
    return replace(solution, gap=gap, coarse=again if len(again) else None)


def _solve_capped(solve: Solver, proves: bool, costs: Costs, a: torch.Tensor, b: torch.Tensor) -> Solution | None:
    """The solution (B = 1) with the smallest gap over growing caps; None if the solver fails with each."""
    best = None
    for cap in _caps(costs.values, a, b) if proves else (None,):
        try:
            found = solve(costs.values if cap is None else costs.values.clamp(max=cap), a, b)
        except RuntimeError:  # the first solution stands
            continue
        if proves:
            found = _without_cap(found, costs.values, a, b)
        found.gap = found.gap + rounding_bound(found, costs, a, b)
        if best is None or found.gap < best.gap:
            best = found
        if best.gap <= _COARSE * best.cost:
            break
    return best


def _caps(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Iterator[float | None]:
    """Caps from a multiple of a typical point's smallest cost to the largest cost; at last None."""
    weighted = cost[0][a[0] > 0][:, b[0] > 0]
    smallest = max(weighted.amin(dim=dim).median().item() for dim in (0, 1))
    if smallest == 0:
        positive = weighted[weighted > 0]
        smallest = positive.min().item() if len(positive) else 0.0
    largest, cap = cost.max().item(), _CAP_FACTOR * smallest
    while 0 < cap < largest:
        yield cap
        cap *= _CAP_FACTOR
    yield None


def _without_cap(found: Solution, cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Solution:
    """The solution (B = 1) of a problem with capped costs, valued at the costs themselves."""
    plan = found.plan.coalesce()
    _, row, column = plan.indices()
    value = (plan.values() @ cost[0, row, column])[None]
    # Points of weight 0 have potentials of the capped costs so far, where the marginals are fixed.
    u, v = (found.u, found.v) if found.row_mass is not None else feasible_potentials(cost, found.v, a, b)
    gap = value - (a * u).sum(dim=1) - (b * v).sum(dim=1)
    return replace(found, cost=value, u=u, v=v, gap=gap.clamp(min=0))


def _marginals(plan: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N) and (B, M) masses of the rows and the columns of plans (B, N, M), sparse or dense."""
    if not plan.is_sparse:
        return plan.sum(dim=2), plan.sum(dim=1)
    batch, rows, columns = plan.shape
    sample, row, column = plan.indices()
    sums = []
    for place, count in ((row, rows), (column, columns)):
        flat = plan.values().new_zeros(batch * count)
        sums.append(flat.index_add_(0, sample * count + place, plan.values()).view(batch, count))
    return tuple(sums)
