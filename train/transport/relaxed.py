"""Shared parts of partial and unbalanced transport, whose plans do not have the weights as marginals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dali_llava.train.transport.simplex import NoPlanError, in_threads
from dali_llava.train.transport.solution import Solution, plan_of_samples


def check_max_iterations(max_iterations: int) -> None:
    """Raises ValueError unless `max_iterations` is at least 1."""
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")


@dataclass
class Found:
    """The solution of one problem, in the unit of the costs, with potentials of the points of weight 0.

    Attributes:
        cost, gap: as in Solution; u: (N,); v: (M,).
        indices: (2, nnz) indices of the entries of the plan, in row-major order; masses: (nnz,).
    """

    cost: float
    gap: float
    u: np.ndarray
    v: np.ndarray
    indices: np.ndarray
    masses: np.ndarray

    def numbers(self) -> np.ndarray:
        """Cost, gap, u, v, row masses and column masses in one vector (2 + 2 N + 2 M)."""
        row_mass, column_mass = plan_marginals(self.indices, self.masses, (len(self.u), len(self.v)))
        return np.concatenate(([self.cost, self.gap], self.u, self.v, row_mass, column_mass))


def solve_each(
    kind: str,
    solve_one: Callable[[np.ndarray, np.ndarray, np.ndarray], Found],
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None,
) -> Solution:
    """Solves all samples, one per thread."""
    batch, rows, columns = cost.shape
    arrays = [tensor.cpu().numpy() for tensor in (cost, a, b)]

    def solve(sample: int) -> Found:
        try:
            return solve_one(*(array[sample] for array in arrays))
        except NoPlanError as error:
            raise RuntimeError(f"no {kind} transport for sample {sample}: {error}") from error

    found = in_threads(solve, batch, num_threads)
    numbers = torch.from_numpy(np.stack([one.numbers() for one in found])).to(cost.device)
    value, gap, u, v, row_mass, column_mass = numbers.split([1, 1, rows, columns, rows, columns], dim=1)
    plan = plan_of_samples([(one.indices, one.masses) for one in found], cost.shape, cost.device)
    return Solution(value[:, 0], plan, u, v, gap[:, 0], row_mass, column_mass)


def plan_marginals(indices: np.ndarray, masses: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (M,) masses of a plan's rows and columns."""
    row, column = indices
    return np.bincount(row, masses, shape[0]), np.bincount(column, masses, shape[1])


def weighted_part(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Rows and columns of positive weight, their weights rescaled to sum to 1, and their largest cost.

    The largest cost, or 1 where all costs are 0, is a unit for the solvers, which have absolute tolerances.
    """
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    return rows, columns, a[rows] / a.sum(), b[columns] / b.sum(), cost[np.ix_(rows, columns)].max() or 1.0
