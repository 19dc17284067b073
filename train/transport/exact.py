"""Exact transport on the CPU: POT's network simplex, one problem a thread."""

from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.train.transport.arcs import likely_arcs
from dali_llava.train.transport.simplex import NoPlanError, SimplexSolution, dense_simplex, in_threads, sparse_simplex
from dali_llava.train.transport.solution import Solution, plan_of_samples


# Bounds that agree to this share of the largest cost count as equal: it is float64's rounding in sums of some thousand
# terms, far below any step the simplex could still take.
ROUNDING = 1e-12
# A plan found on some of the arcs is accepted when its cost exceeds the lower bound by no more than this share of
# itself. Rounding alone is some ten thousand times less, unless the cost is tiny beside the largest distance.
TOLERANCE = 1e-10
# Reduced costs above this, in largest costs, count as not negative. The simplex's own threshold lies near it.
VIOLATION = -1e-14
# Points a side from which the simplex is worth starting on some of the arcs.
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
    """Solves each problem to optimality on the CPU and proves it with the potentials.

    Of a large problem the simplex at first gets a few per cent of the arcs (`likely_arcs`, computed on the cost's
    device). Its potentials are checked on all of them; arcs that they violate are added, and it runs again.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are taken out.
        b: (B, M) float64 weights, likewise.
        num_threads: how many problems are solved at a time; by default this process's share of the cores it may use.
        max_iterations: of the simplex, for one problem and run.
        sample_names: what messages call the samples; 0, 1 and so on by default.

    Raises:
        RuntimeError: the simplex stopped without an optimum; the message names the sample.
    """
    batch, rows, columns = cost.shape
    # POT's tolerances are absolute, hence costs in [0, 1].
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    # All copies start before the one wait for the device.
    tensors = [cost, scale, a, b] + ([likely_arcs(cost, a, b)] if min(rows, columns) >= _LARGE else [])
    arrays = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if cost.is_cuda:
        torch.cuda.current_stream(cost.device).synchronize()
    arrays = [array.numpy() for array in arrays]

    def solve(sample: int):
        try:
            return _solve_one(*(array[sample] for array in arrays), max_iterations=max_iterations)
        except NoPlanError as error:
            name = sample if sample_names is None else sample_names[sample]
            raise RuntimeError(f"no exact transport for sample {name}: {error}") from error

    bounds, plans = zip(*in_threads(solve, batch, num_threads), strict=True)
    bounds = torch.from_numpy(np.stack(bounds)).to(cost.device) * scale[:, None]
    value, gap, u, v = bounds.split([1, 1, rows, columns], dim=1)
    return Solution(value[:, 0], plan_of_samples(plans, cost.shape, cost.device), u, v, gap[:, 0])


def _solve_one(
    cost: np.ndarray,
    scale: float,
    a: np.ndarray,
    b: np.ndarray,
    kept: np.ndarray | None = None,
    *,
    max_iterations: int,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cost, gap, u and v over `scale`, in one vector (2 + N + M); the plan's indices (2, nnz) and masses (nnz)."""
    cost = cost / scale
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    # Without a copy where nothing is taken out.
    of_columns = cost if len(columns) == len(b) else cost[:, columns]
    of_rows = cost if len(rows) == len(a) else cost[rows]
    inner = of_columns if len(rows) == len(a) else of_rows if len(columns) == len(b) else of_columns[rows]
    # The two must have the same sum to the last digit.
    mass_a, mass_b = a[rows] / a.sum(), b[columns] / b.sum()
    solution = None
    if kept is not None:
        solution = _on_some_arcs(inner, mass_a, mass_b, kept[np.ix_(rows, columns)], max_iterations)
    if solution is None:
        try:
            solution = dense_simplex(np.ascontiguousarray(inner), mass_a, mass_b, max_iterations)
        except NoPlanError as error:
            raise NoPlanError(f"{error}; raise max_iterations or use 'sinkhorn'") from error

    # The best row potentials for the columns', then the columns' for these. Both are feasible by construction, so that
    # they bound the optimum from below, and they reach the points of weight 0, which the simplex has not seen.
    slack = of_columns - solution.v
    u = slack.min(axis=1)
    # Into memory that has been touched, where it will do: new pages take longer than the subtraction.
    v = np.subtract(of_rows, u[rows, None], out=slack if slack.shape == of_rows.shape else None).min(axis=0)
    gap = solution.cost - mass_a @ u[rows] - mass_b @ v[columns]
    if gap < -ROUNDING:
        raise NoPlanError("the plan's cost lies below the lower bound")
    gap = max(gap, 0.0)
    row, column = solution.indices
    return np.concatenate(([solution.cost, gap], u, v)), (np.stack((rows[row], columns[column])), solution.masses)


def _on_some_arcs(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, kept: np.ndarray, max_iterations: int
) -> SimplexSolution | None:
    """The optimum, from the arcs that are kept and more where they do not do; None where that leads nowhere.

    Args:
        cost: (N, M) in [0, 1]; a: (N,) weights, positive; b: (M,) weights; kept: (N, M) bool, overwritten.
    """
    most = sum(cost.shape) * 4  # arcs that one round may add
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
        if len(violated) > most:
            violated = violated[np.argpartition(slack.ravel()[violated], most)[:most]]
        kept.ravel()[violated] = True
    return None
