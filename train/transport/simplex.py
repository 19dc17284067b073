"""The network simplex of POT on all or some arcs of one problem, and threads for many problems."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dali_llava.train.transport.arcs import SAME_MASS


T = TypeVar("T")


@dataclass
class SimplexSolution:
    """An optimum of one problem with N rows and M columns.

    Attributes:
        cost: of the plan.
        indices: (2, nnz) rows and columns of the plan's entries, in row-major order.
        masses: (nnz,) the entries, positive.
        u: (N,) row potentials; v: (M,) column potentials. Feasible on the arcs that the simplex was given.
    """

    cost: float
    indices: np.ndarray
    masses: np.ndarray
    u: np.ndarray
    v: np.ndarray


class NoPlanError(RuntimeError):
    """The simplex stops without an optimum; the message gives the reason."""


def dense_simplex(cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_iterations: int) -> SimplexSolution:
    """The optimum over all arcs.

    Args:
        cost: (N, M) float64, C-contiguous, in [0, 1]: the simplex's tolerances are absolute.
        a: (N,) float64 weights, positive; b: (M,) positive weights with the same sum.
        max_iterations: of the simplex.

    Raises:
        NoPlanError: the iterations run out, or the simplex fails.
    """
    import ot  # the import takes a second, and most of the package does not need it

    plan, log = ot.emd(a, b, cost, numItermax=max_iterations, log=True, center_dual=False)
    _check_result(log)
    indices = np.stack(np.nonzero(plan))
    masses = plan[indices[0], indices[1]]
    return SimplexSolution(masses @ cost[indices[0], indices[1]], indices, masses, log["u"], log["v"])


def sparse_simplex(
    arcs: tuple[np.ndarray, np.ndarray, np.ndarray], a: np.ndarray, b: np.ndarray, max_iterations: int
) -> SimplexSolution:
    """The optimum over some of the arcs.

    Args:
        arcs: (arcs,) rows, (arcs,) columns, in row-major order, and (arcs,) costs in [0, 1].
        a, b, max_iterations: as in `dense_simplex`.

    Raises:
        NoPlanError: the iterations run out, the simplex fails, or the arcs cannot carry the weights.
    """
    import ot
    from scipy.sparse import coo_array

    row, column, cost = arcs
    restricted = coo_array((cost, (row, column)), shape=(len(a), len(b)))
    plan, log = ot.emd(a, b, restricted, numItermax=max_iterations, log=True, center_dual=False)
    _check_result(log)
    order = np.lexsort((plan.col, plan.row))
    order = order[plan.data[order] > 0]
    indices, masses = np.stack((plan.row, plan.col))[:, order].astype(np.int64), plan.data[order]
    # If POT finds no plan, it returns a cheap plan that does not move all mass. Its result code reports that. The
    # marginals are checked as well, because the lower bound does not reveal such a plan.
    missing = max(
        np.abs(np.bincount(indices[0], masses, len(a)) - a).max(),
        np.abs(np.bincount(indices[1], masses, len(b)) - b).max(),
    )
    if not missing < SAME_MASS:
        raise NoPlanError("the plan leaves mass behind")
    # The places of the given arcs are sorted, so a binary search finds each arc of the plan.
    place = np.searchsorted(row * len(b) + column, indices[0] * len(b) + indices[1])
    return SimplexSolution(masses @ cost[place], indices, masses, log["u"], log["v"])


def _check_result(log: dict) -> None:
    if log["warning"] is not None:
        raise NoPlanError(str(log["warning"]).strip().splitlines()[0])


def in_threads(solve: Callable[[int], T], count: int, num_threads: int | None) -> list[T]:
    """Returns `solve(0)` to `solve(count - 1)`, computed by threads.

    Threads help if `solve` releases the interpreter lock, as the network simplex of POT does.

    Args:
        solve: takes the number of a problem.
        count: number of problems.
        num_threads: maximum number of threads. Defaults to this process's share of the available cores.
    """
    threads = min(count, num_threads or _available_cores())
    if threads <= 1:
        return [solve(i) for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(solve, range(count)))


def _available_cores() -> int:
    """Number of cores that this process may use, divided by the number of processes started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
