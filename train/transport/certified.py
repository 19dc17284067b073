"""Exact transport on a few arcs: Sinkhorn proposes them, a sparse simplex solves, a check on all arcs certifies."""

from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.train.transport.arcs import ARCS_PER_POINT, EPS, likely_arcs
from dali_llava.train.transport.costs import cost_scale
from dali_llava.train.transport.exact import ROUNDING, TOLERANCE, VIOLATION, solve_exact
from dali_llava.train.transport.simplex import NoPlanError, in_threads, sparse_simplex
from dali_llava.train.transport.sinkhorn import feasible_potentials
from dali_llava.train.transport.solution import Solution, plan_of_samples


def solve_certified(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
    eps: Sequence[float] = EPS,
    num_iterations: Sequence[int] = (10, 10, 20),
    arcs_per_point: int = ARCS_PER_POINT,
    rounds: int = 6,
) -> Solution:
    """Finds the optimum with a network simplex on a few per cent of the arcs, and proves it on all arcs.

    The network simplex [1] gets the arcs of `likely_arcs`. Its potentials are then checked on every arc in float64
    [2]. Arcs that violate them are added, and the simplex runs again. `solve_exact` solves the problems that the last
    round leaves without a proof. Only the simplex runs on the CPU; all other steps are batched on the device of the
    costs.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are left out.
        b: (B, M) float64 weights, each row summing to 1.
        num_threads: number of problems solved at a time. Defaults to this process's share of the available cores.
        max_iterations: limit of simplex iterations per problem and round.
        eps: entropy strengths of Sinkhorn, in mean costs of the sample, used in turn.
        num_iterations: number of Sinkhorn iterations for each eps. The default is larger than in `solve_exact`: on a
            GPU these iterations take less time than another round of the simplex.
        arcs_per_point: number of arcs to propose, divided by N + M; also how many arcs per row and column a round may
            add.
        rounds: maximum number of rounds of the sparse simplex. With 0, `solve_exact` solves all problems.

    Returns:
        Solution with a sparse plan. `gap` is the cost minus the lower bound from the potentials: at most 1e-10 of the
        cost or, if the cost is tiny beside the largest distance of the sample, 1e-12 of that distance.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: `solve_exact` does not find the optimum either; the message names the sample.

    References:
        [1] N. Bonneel, M. van de Panne, S. Paris and W. Heidrich, "Displacement Interpolation Using Lagrangian Mass
            Transport", SIGGRAPH Asia, 2011 (the network simplex of POT).
        [2] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, sections 2.5 and 3.2 (the dual problem and
            c-transforms).

    Example:
        >>> import torch
        >>> cost = torch.tensor([[[0.0, 4.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> solve_certified(cost, weights, weights).cost
        tensor([0.5000], dtype=torch.float64)
    """
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, not {rounds}")
    batch, rows, columns = cost.shape
    # The tolerances of POT are absolute, so costs are scaled to [0, 1].
    scale = cost_scale(cost)
    scaled = cost / scale[:, None, None]
    kept = likely_arcs(scaled, a, b, eps, num_iterations, arcs_per_point)

    value, gap = scaled.new_zeros(batch), scaled.new_zeros(batch)
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    plans: list[tuple[np.ndarray, np.ndarray] | None] = [None] * batch
    open_samples = torch.arange(batch, device=cost.device)
    unproven = []
    for _ in range(rounds):
        if not len(open_samples):
            break
        of_cost, of_a, of_b = scaled[open_samples], a[open_samples], b[open_samples]
        solved = _solve_restricted(of_cost, of_a, of_b, kept[open_samples], num_threads, max_iterations)
        numbers, found = zip(*solved, strict=True)
        numbers = torch.from_numpy(np.stack(numbers)).to(cost.device)
        failed, of_value, simplex_u, simplex_v = numbers.split([1, 1, rows, columns], dim=1)
        of_u, of_v = feasible_potentials(of_cost, simplex_v, of_a, of_b)
        of_value = of_value[:, 0]
        of_gap = of_value - (of_a * of_u).sum(dim=1) - (of_b * of_v).sum(dim=1)

        reduced = of_cost - simplex_u[..., None] - simplex_v[:, None]
        reduced.masked_fill_(~_weighted(of_a, of_b) | kept[open_samples], torch.inf)
        added = _smallest_per_line(reduced, arcs_per_point) & (reduced < VIOLATION)
        grows = added.flatten(1).any(dim=1)
        proven = (of_gap <= TOLERANCE * of_value) | (~grows & (of_gap <= ROUNDING))
        # A cost below the lower bound is wrong, and a plan that the simplex did not finish has no cost.
        sound = (failed[:, 0] == 0) & (of_gap >= -ROUNDING)

        done = proven & sound
        value[open_samples[done]], gap[open_samples[done]] = of_value[done], of_gap[done].clamp(min=0)
        u[open_samples[done]], v[open_samples[done]] = of_u[done], of_v[done]
        for sample, plan, ready in zip(open_samples.tolist(), found, done.tolist(), strict=True):
            if ready:
                plans[sample] = plan
        again = ~done & sound & grows
        unproven += open_samples[~done & ~again].tolist()
        kept[open_samples[again]] |= added[again]
        open_samples = open_samples[again]

    unproven = sorted(unproven + open_samples.tolist())
    value, gap, u, v = value * scale, gap * scale, u * scale[:, None], v * scale[:, None]
    if unproven:
        dense = solve_exact(
            cost[unproven], a[unproven], b[unproven], num_threads, max_iterations, sample_names=unproven
        )
        value[unproven], gap[unproven], u[unproven], v[unproven] = dense.cost, dense.gap, dense.u, dense.v
        position, *arcs = dense.plan.indices().cpu().numpy()
        masses = dense.plan.values().cpu().numpy()
        for i, sample in enumerate(unproven):
            plans[sample] = np.stack(arcs)[:, position == i], masses[position == i]
    return Solution(value, plan_of_samples(plans, cost.shape, cost.device), u, v, gap)


def _weighted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N, M) bool, True for arcs between two points of positive weight."""
    return (a > 0)[..., None] & (b > 0)[:, None]


def _smallest_per_line(reduced: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, M) bool, True for the `count` smallest of each row and of each column."""
    chosen = torch.zeros_like(reduced, dtype=torch.bool)
    for dim in (1, 2):
        indices = reduced.topk(min(count, reduced.shape[dim]), dim=dim, largest=False, sorted=False).indices
        chosen.scatter_(dim, indices, True)
    return chosen


def _solve_restricted(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    kept: torch.Tensor,
    num_threads: int | None,
    max_iterations: int,
) -> list[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """The result of `_solve_one` for each sample. Only the kept arcs leave the device."""
    sample, row, column = kept.nonzero(as_tuple=True)
    ends = np.cumsum(kept.sum(dim=(1, 2)).cpu().numpy())[:-1]
    arcs = [np.split(values.cpu().numpy(), ends) for values in (row, column, cost[sample, row, column])]
    a, b = a.cpu().numpy(), b.cpu().numpy()

    def solve(i: int):
        return _solve_one(a[i], b[i], *(values[i] for values in arcs), max_iterations)

    return in_threads(solve, len(a), num_threads)


def _solve_one(
    a: np.ndarray, b: np.ndarray, row: np.ndarray, column: np.ndarray, costs: np.ndarray, max_iterations: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Failure (0 or 1), cost, u and v in one vector (2 + N + M); the plan's indices (2, nnz) and masses (nnz).

    Args:
        a: (N,) weights; b: (M,) weights.
        row: (arcs,) source of each arc; column: its target; costs: its cost in [0, 1].
    """
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    place_a, place_b = np.cumsum(a > 0) - 1, np.cumsum(b > 0) - 1
    u, v = np.zeros(len(a)), np.zeros(len(b))
    try:
        # Both weights must have the same sum, up to the last digit.
        solution = sparse_simplex(
            (place_a[row], place_b[column], costs), a[rows] / a.sum(), b[columns] / b.sum(), max_iterations
        )
    except NoPlanError:
        return np.concatenate(([1.0, 0.0], u, v)), (np.zeros((2, 0), dtype=np.int64), np.zeros(0))
    u[rows], v[columns] = solution.u, solution.v
    indices = np.stack((rows[solution.indices[0]], columns[solution.indices[1]]))
    return np.concatenate(([0.0, solution.cost], u, v)), (indices, solution.masses)
