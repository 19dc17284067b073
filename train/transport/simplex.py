"""POT's network simplex on one problem, on all arcs or on some, and many problems in threads."""

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
    """The simplex stopped without an optimum; the message says why."""


def dense_simplex(cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_iterations: int) -> SimplexSolution:
    """The optimum over all arcs.

    Args:
        cost: (N, M) float64, C-contiguous, in [0, 1]: the simplex's tolerances are absolute.
        a: (N,) float64 weights, positive; b: (M,) weights, likewise, with the same sum.
        max_iterations: of the simplex.

    Raises:
        NoPlanError: the iterations ran out, or the simplex failed.
    """
    import ot  # takes a second to import, and most of the package has no use for it

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
        NoPlanError: likewise, or the arcs cannot carry the weights.
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
    # POT hands back a cheap plan that does not move everything where it finds none. Its result code says so; this
    # makes sure, for the lower bound cannot tell such a plan from a bad one.
    astray = max(
        np.abs(np.bincount(indices[0], masses, len(a)) - a).max(),
        np.abs(np.bincount(indices[1], masses, len(b)) - b).max(),
    )
    if not astray < SAME_MASS:
        raise NoPlanError("the plan leaves mass behind")
    # Places in row-major order are sorted, so that each of the plan's arcs is found among those given.
    place = np.searchsorted(row * len(b) + column, indices[0] * len(b) + indices[1])
    return SimplexSolution(masses @ cost[place], indices, masses, log["u"], log["v"])


def _check_result(log: dict) -> None:
    if log["warning"] is not None:
        raise NoPlanError(str(log["warning"]).strip().splitlines()[0])


def in_threads(solve: Callable[[int], T], count: int, num_threads: int | None) -> list[T]:
    """`solve(0)` to `solve(count - 1)`, at most `num_threads` at a time, by default this process's share of the cores.

    Of use where `solve` releases the interpreter's lock, as POT's network simplex does.
    """
    threads = min(count, num_threads or _available_cores())
    if threads <= 1:
        return [solve(i) for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(solve, range(count)))


def _available_cores() -> int:
    """Cores that this process may run on, shared with its siblings when a launcher started several on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
