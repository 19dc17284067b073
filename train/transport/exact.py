"""Exact transport: POT's network simplex, one problem a thread."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from dali_llava.train.transport.solution import Solution, plan_of_samples


T = TypeVar("T")

# Bounds that agree to this share of the largest cost count as equal: it is float64's rounding in sums of some thousand
# terms, far below any step the simplex could still take.
ROUNDING = 1e-12


def solve_exact(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
    sample_names: Sequence[int] | None = None,
) -> Solution:
    """Solves each problem to optimality on the CPU and proves it with the potentials.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are taken out.
        b: (B, M) float64 weights, likewise.
        num_threads: how many problems are solved at a time; by default this process's share of the cores it may use.
        max_iterations: of the simplex, for one problem.
        sample_names: what messages call the samples; 0, 1 and so on by default.

    Raises:
        RuntimeError: the simplex stopped without an optimum; the message names the sample.
    """
    batch, rows, columns = cost.shape
    # POT's tolerances are absolute, hence costs in [0, 1]. One tensor, so that there is one wait for the device.
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    packed = torch.cat(((cost / scale[:, None, None]).flatten(1), a, b), dim=1).cpu().numpy()

    def solve(sample: int):
        costs, weights = np.split(packed[sample], [rows * columns])
        a, b = np.split(weights, [rows])
        name = sample if sample_names is None else sample_names[sample]
        return _solve_one(costs.reshape(rows, columns), a, b, max_iterations, name)

    bounds, plans = zip(*in_threads(solve, batch, num_threads), strict=True)
    bounds = torch.from_numpy(np.stack(bounds)).to(cost.device) * scale[:, None]
    value, gap, u, v = bounds.split([1, 1, rows, columns], dim=1)
    return Solution(value[:, 0], plan_of_samples(plans, cost.shape, cost.device), u, v, gap[:, 0])


def in_threads(solve: Callable[[int], T], count: int, num_threads: int | None) -> list[T]:
    """`solve(0)` to `solve(count - 1)`, at most `num_threads` at a time, by default this process's share of the cores.

    Of use where `solve` releases the interpreter's lock, as POT's network simplex does.
    """
    threads = min(count, num_threads or _available_cores())
    if threads <= 1:
        return [solve(i) for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(solve, range(count)))


def _solve_one(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_iterations: int, sample: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cost, gap, u and v in one vector (2 + N + M); the plan's indices (2, nnz) and masses (nnz)."""
    import ot  # takes a second to import, and most of the package has no use for it

    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    inner = cost
    if len(rows) < len(a) or len(columns) < len(b):
        inner = np.ascontiguousarray(cost[np.ix_(rows, columns)])
    # The two must have the same sum to the last digit.
    mass_a, mass_b = a[rows] / a.sum(), b[columns] / b.sum()
    plan, log = ot.emd(mass_a, mass_b, inner, numItermax=max_iterations, log=True, center_dual=False)
    if log["warning"] is not None:
        reason = str(log["warning"]).strip().splitlines()[0]
        raise RuntimeError(f"no exact transport for sample {sample}: {reason}; raise max_iterations or use 'sinkhorn'")

    # The best row potentials for the columns', then the columns' for these. Both are feasible by construction, so that
    # they bound the optimum from below, and they reach the points of weight 0, which the simplex has not seen.
    u = (cost[:, columns] - log["v"]).min(axis=1)
    v = (cost[rows] - u[rows, None]).min(axis=0)
    indices = np.stack(np.nonzero(plan))
    masses = plan[indices[0], indices[1]]
    value = masses @ inner[indices[0], indices[1]]
    gap = value - mass_a @ u[rows] - mass_b @ v[columns]
    if gap < -ROUNDING:
        raise RuntimeError(f"no exact transport for sample {sample}: the plan's cost lies below the lower bound")
    gap = gap if gap > ROUNDING else 0.0
    return np.concatenate(([value, gap], u, v)), (np.stack((rows[indices[0]], columns[indices[1]])), masses)


def _available_cores() -> int:
    """Cores that this process may run on, shared with its siblings when a launcher started several on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
