"""Exact transport on the CPU with the network simplex of POT, one problem per thread."""

from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.train.transport.arcs import likely_arcs, smallest_places
from dali_llava.train.transport.costs import cost_scale
from dali_llava.train.transport.simplex import NoPlanError, SimplexSolution, dense_simplex, in_threads, sparse_simplex
from dali_llava.train.transport.solution import Solution, plan_of_samples


# Bounds that differ by less than this share of the largest cost are equal up to float64 rounding in sums of about a
# thousand terms.
ROUNDING = 1e-12
# A plan on some of the arcs is accepted if its cost exceeds the lower bound by at most this share of the cost.
# Rounding alone is about ten thousand times smaller, unless the cost is tiny beside the largest distance.
TOLERANCE = 1e-10
# Reduced costs above this share of the largest cost are treated as non-negative. The simplex uses a similar threshold.
VIOLATION = -1e-14
# Number of points per side from which the simplex starts on some of the arcs.
_LARGE = 128
_ROUNDS = 6


def solve_exact(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
    sample_names: Sequence[int] | None = None,
) -> Solution:
    """Finds the optimum of each problem on the CPU with a network simplex [1], and proves it with the potentials [2].

    For a large problem the simplex starts on a few per cent of the arcs (`likely_arcs`, computed on the device of the
    costs). Its potentials are checked on all arcs. Arcs that violate them are added, and the simplex runs again.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are left out.
        b: (B, M) float64 weights, each row summing to 1.
        num_threads: number of problems solved at a time. Defaults to this process's share of the available cores.
        max_iterations: limit of simplex iterations per problem and run.
        sample_names: numbers of the samples in messages. Defaults to 0, 1 and so on.

    Returns:
        Solution with a sparse plan of at most N + M - 1 entries. `gap` is the cost minus the lower bound from the
        potentials, without the rounding errors of the costs.

    Raises:
        RuntimeError: the simplex stops without an optimum; the message names the sample.

    References:
        [1] N. Bonneel, M. van de Panne, S. Paris and W. Heidrich, "Displacement Interpolation Using Lagrangian Mass
            Transport", SIGGRAPH Asia, 2011 (the network simplex of POT).
        [2] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 2.5 (the dual problem).

    Example:
        >>> import torch
        >>> cost = torch.tensor([[[0.0, 4.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> solution = solve_exact(cost, weights, weights)
        >>> solution.cost, solution.plan.to_dense()[0]
        (tensor([0.5000], dtype=torch.float64), tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64))
    """
    batch, rows, columns = cost.shape
    # The tolerances of POT are absolute, so costs are scaled to [0, 1].
    scale = cost_scale(cost)
    # All copies start before the single synchronization.
    tensors = [cost, scale, a, b] + ([likely_arcs(cost, a, b)] if min(rows, columns) >= _LARGE else [])
    arrays = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if cost.is_cuda:
        torch.cuda.current_stream(cost.device).synchronize()
    arrays = [array.numpy() for array in arrays]

    def solve(sample: int):
        try:
            return _exact_one(*(array[sample] for array in arrays), max_iterations=max_iterations)
        except NoPlanError as error:
            name = sample if sample_names is None else sample_names[sample]
            raise RuntimeError(f"no exact transport for sample {name}: {error}") from error

    bounds, plans = zip(*in_threads(solve, batch, num_threads), strict=True)
    bounds = torch.from_numpy(np.stack(bounds)).to(cost.device) * scale[:, None]
    value, gap, u, v = bounds.split([1, 1, rows, columns], dim=1)
    return Solution(value[:, 0], plan_of_samples(plans, cost.shape, cost.device), u, v, gap[:, 0])


def _exact_one(
    cost: np.ndarray,
    scale: float,
    a: np.ndarray,
    b: np.ndarray,
    kept: np.ndarray | None = None,
    *,
    max_iterations: int,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cost, gap, u and v in units of `scale` (2 + N + M); the plan's indices (2, nnz) and masses (nnz)."""
    cost = cost / scale
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    # No copy is made where all points have weight.
    of_columns = cost if len(columns) == len(b) else cost[:, columns]
    of_rows = cost if len(rows) == len(a) else cost[rows]
    inner = of_columns if len(rows) == len(a) else of_rows if len(columns) == len(b) else of_columns[rows]
    # Both weights must have the same sum, up to the last digit.
    mass_a, mass_b = a[rows] / a.sum(), b[columns] / b.sum()
    solution = None
    if kept is not None:
        solution = _on_some_arcs(inner, mass_a, mass_b, kept[np.ix_(rows, columns)], max_iterations)
    if solution is None:
        try:
            solution = dense_simplex(np.ascontiguousarray(inner), mass_a, mass_b, max_iterations)
        except NoPlanError as error:
            raise NoPlanError(f"{error}; raise max_iterations or use 'sinkhorn'") from error

    # The best row potentials for the given column potentials, then the best column potentials for these. They are
    # feasible by construction, so they bound the optimum from below. They include the points of weight 0, which the
    # simplex does not see.
    slack = of_columns - solution.v
    u = slack.min(axis=1)
    # Reuses memory where the shape allows: touching new pages takes longer than the subtraction.
    v = np.subtract(of_rows, u[rows, None], out=slack if slack.shape == of_rows.shape else None).min(axis=0)
    gap = solution.cost - mass_a @ u[rows] - mass_b @ v[columns]
    if gap < -ROUNDING:
        raise NoPlanError("the plan's cost lies below the lower bound")
    gap = gap if gap > ROUNDING * solution.cost else 0.0
    row, column = solution.indices
    return np.concatenate(([solution.cost, gap], u, v)), (np.stack((rows[row], columns[column])), solution.masses)


def _on_some_arcs(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, kept: np.ndarray, max_iterations: int
) -> SimplexSolution | None:
    """The optimum, starting from the kept arcs and adding more as needed; None if the rounds do not prove it.

    Args:
        cost: (N, M) in [0, 1]; a: (N,) weights, positive; b: (M,) weights; kept: (N, M) bool, overwritten.
    """
    limit = sum(cost.shape) * 4  # number of arcs that one round may add
    slack = np.empty_like(cost)
    for _ in range(_ROUNDS):
        row, column = np.nonzero(kept)
        try:
            solution = sparse_simplex((row, column, cost[row, column]), a, b, max_iterations)
        except NoPlanError:
            return None
        np.subtract(cost, solution.v, out=slack)
        gap = solution.cost - a @ slack.min(axis=1) - b @ solution.v
        if gap < -ROUNDING:
            return None
        if gap <= max(TOLERANCE * solution.cost, ROUNDING):
            return solution
        slack -= solution.u[:, None]
        slack[kept] = 0.0
        violated = np.flatnonzero(slack < VIOLATION)
        if not len(violated):
            return solution if gap <= ROUNDING else None
        kept.ravel()[violated[smallest_places(slack.ravel()[violated], limit)]] = True
    return None
