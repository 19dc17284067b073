"""Unbalanced transport: mass may vanish or appear, at a penalty."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import logsumexp, xlog1py

from dali_llava.train.transport.arcs import smallest_places
from dali_llava.train.transport.exact import ROUNDING
from dali_llava.train.transport.relaxed import (
    Found,
    check_max_iterations,
    plan_marginals,
    solve_each,
    weighted_part,
)
from dali_llava.train.transport.simplex import NoPlanError, dense_simplex
from dali_llava.train.transport.solution import Solution


# Number of POT iterations on all arcs, enough to identify the arcs that matter. For 512 x 576 points one takes 3 ms
# on all arcs and about 60 us on the selected arcs.
_FULL_ITERATIONS = 20
_SIMPLEX_ITERATIONS = 10_000_000
# Number of selected arcs divided by the number of points: at the start, and for each addition. The last is a minimum.
_ARCS_PER_POINT = 6
_MORE_ARCS_PER_POINT = 2
_FEWEST_ARCS = 2**12
# Iterations before the bound, which needs all arcs, is first computed. The number then doubles up to a maximum.
_FIRST_STRETCH = 100
_LONGEST_STRETCH = 2000
# Arcs with less mass are dropped before they become denormal numbers, which take a hundred times longer.
_VANISHED = 1e-30
# The largest exponent in a returned potential, so that the potentials of points without weight stay finite.
_LARGEST_EXPONENT = 600.0
# Gaps below this share of the largest cost are float64 rounding, which iterations do not reduce.
_EXACT = 1e-15
_TINY = np.finfo(np.float64).tiny


def solve_unbalanced(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    relaxation: float = 1.0,
    relative: bool = True,
    num_threads: int | None = None,
    max_iterations: int = 10_000,
    tolerance: float = 1e-4,
) -> Solution:
    """Penalizes mass that vanishes or appears: `min <P, C> + rho KL(P 1 | a) + rho KL(P^T 1 | b)` over all P >= 0.

    `KL(p | q) = sum p log(p / q) - p + q`. The problem has no entropy term, so few arcs carry mass. Multiplicative
    updates [1] run for a few iterations on all arcs, in POT, and then on selected arcs. Potentials that are feasible
    on all arcs select them and bound the error of the plan [2], so `gap` is valid wherever the iterations stop. The
    updates start from a mean with the balanced optimum; otherwise strong penalties converge slowly.

    Args:
        cost: (B, N, M) float64, finite, at least 0.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are left out.
        b: (B, M) float64 weights, each row summing to 1.
        relaxation: strength rho of the penalty, above 0. A pair of single points at cost c keeps mass
            exp(-c / (2 rho)).
        relative: whether relaxation is in mean costs of the sample, `a^T C b`; otherwise it is in the unit of the
            costs.
        num_threads: number of problems solved at a time. Defaults to this process's share of the available cores.
        max_iterations: limit of iterations on the selected arcs, per problem.
        tolerance: the iterations stop when the gap is at most this share of the cost. The relative error of a gradient
            is about the root of that: 5% at 1e-4 and 2% at 1e-5, on 512 x 576 points. Points of few dimensions under
            strong penalties may need more iterations than the default.

    Returns:
        Solution with a sparse plan and its marginals. `cost` includes the penalties. `u` and `v` are the derivatives
        of the cost by the weights at a fixed rho, `rho (1 - exp(-f / rho))` for potentials f, with
        `<a, u> + <b, v> = cost - gap`.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: no start is found, or it is not finite; the message names the sample.

    References:
        [1] L. Chapel, R. Flamary, H. Wu, C. Févotte and G. Gasso, "Unbalanced Optimal Transport through Non-negative
            Penalized Linear Regression", NeurIPS, 2021, section 3.
        [2] M. Liero, A. Mielke and G. Savaré, "Optimal Entropy-Transport problems and a new Hellinger-Kantorovich
            distance between positive measures", Inventiones mathematicae, 2018, section 4.

    Example:
        >>> import math
        >>> import torch
        >>> cost, weight = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> mass = solve_unbalanced(cost, weight, weight, relaxation=0.5).plan.to_dense().item()
        >>> round(mass, 6), round(math.exp(-1 / (2 * 0.5)), 6)
        (0.367879, 0.367879)
    """
    if not 0 < relaxation < math.inf:
        raise ValueError(f"relaxation must be above 0 and finite, not {relaxation}")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must be from 0 to 1, not {tolerance}")
    check_max_iterations(max_iterations)
    options = {"relaxation": relaxation, "relative": relative}
    limits = {"max_iterations": max_iterations, "tolerance": tolerance}
    return solve_each("unbalanced", partial(_unbalanced_one, **options, **limits), cost, a, b, num_threads)


def _unbalanced_one(
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    relaxation: float,
    relative: bool,
    max_iterations: int,
    tolerance: float,
) -> Found:
    rows, columns, mass_a, mass_b, scale = weighted_part(cost, a, b)
    cost = cost / scale
    inner = cost[np.ix_(rows, columns)]
    # Any strength will do where all costs are 0.
    rho = relaxation * ((mass_a @ inner @ mass_b or 1.0) if relative else 1 / scale)
    problem = _Penalised(inner, mass_a, mass_b, rho)
    indices, masses, v = _multiplicative(problem, max_iterations, tolerance)

    u = (cost[:, columns] - v).min(axis=1)
    v = (cost[rows] - u[rows, None]).min(axis=0)
    # The derivatives of the dual value by the weights. They are at most u and v, so they are feasible too.
    u, v = (-rho * np.expm1(np.minimum(-potential / rho, _LARGEST_EXPONENT)) for potential in (u, v))
    value = problem.primal(indices, masses)
    gap = value - mass_a @ u[rows] - mass_b @ v[columns]
    if not gap >= -ROUNDING:
        raise NoPlanError("the plan's cost lies below the lower bound")
    indices = np.stack((rows[indices[0]], columns[indices[1]]))
    return Found(value * scale, max(gap, 0.0) * scale, u * scale, v * scale, indices, masses)


@dataclass
class _Penalised:
    """`min <P, C> + rho KL(P 1 | a) + rho KL(P^T 1 | b)` over points that have weight, and its dual.

    The dual is `max rho <a, 1 - exp(-u / rho)> + rho <b, 1 - exp(-v / rho)>` over `u_i + v_j <= C_ij`.

    Attributes:
        cost: (N, M) in [0, 1]; a: (N,) positive weights with sum 1; b: (M,) the same; rho: above 0.
    """

    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    rho: float

    def primal(self, indices: np.ndarray, masses: np.ndarray) -> float:
        """The objective of a plan, given by (2, nnz) indices and (nnz,) masses."""
        marginals = plan_marginals(indices, masses, self.cost.shape)
        penalty = sum(_divergence(*pair) for pair in zip(marginals, (self.a, self.b), strict=True))
        return masses @ self.cost[indices[0], indices[1]] + self.rho * penalty

    def prices(self, indices: np.ndarray, masses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u (N,) and v (M,) for the marginals of a plan. Those of the optimal plan are optimal potentials."""
        marginals = plan_marginals(indices, masses, self.cost.shape)
        with np.errstate(divide="ignore"):
            u, v = (-self.rho * np.log(mass / own) for mass, own in zip(marginals, (self.a, self.b), strict=True))
        # No optimal potential exceeds the largest cost, because some potential on the other side is at least 0.
        return np.minimum(u, 1.0), np.minimum(v, 1.0)

    def dual(self, v: np.ndarray) -> tuple[float, np.ndarray]:
        """A lower bound of the optimum from any v (M,), and the feasible v that gives it (with its largest u)."""
        u = (self.cost - v).min(axis=1)
        v = (self.cost - u[:, None]).min(axis=0)
        # A constant can move from one side to the other. The best constant gives both sides equal mass.
        shift = self.rho / 2 * (logsumexp(-u / self.rho, b=self.a) - logsumexp(-v / self.rho, b=self.b))
        u, v = u + shift, v - shift
        with np.errstate(over="ignore"):
            return -self.rho * (self.a @ np.expm1(-u / self.rho) + self.b @ np.expm1(-v / self.rho)), v


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p | q) for q > 0, accurate also where p and q are close, as under strong penalties."""
    excess = (p - q) / q
    return q @ (xlog1py(1 + excess, excess) - excess)


def _start(problem: _Penalised) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """A plan on selected arcs, as indices (2, nnz) and masses (nnz,), and a lower bound with its v (M,)."""
    import ot  # the import takes a second, and most of the package does not need it

    cost, a, b, rho = problem.cost, problem.a, problem.b, problem.rho
    plan = ot.unbalanced.mm_unbalanced(a, b, cost, rho, numItermax=_FULL_ITERATIONS, stopThr=0)
    if not np.isfinite(plan).all():
        raise NoPlanError("the iterations left the range of float64")
    balanced = dense_simplex(cost, a, b, _SIMPLEX_ITERATIONS)
    every = np.indices(cost.shape).reshape(2, -1)
    u, v = problem.prices(every, plan.ravel())
    candidates = (np.zeros_like(b), balanced.v, v, (cost - u[:, None]).min(axis=0))
    bound, best_v = max(map(problem.dual, candidates), key=lambda pair: pair[0])

    reduced = cost - best_v
    reduced -= reduced.min(axis=1, keepdims=True)
    reduced[balanced.indices[0], balanced.indices[1]] = -1.0  # always selected
    indices = every[:, smallest_places(reduced.ravel(), max(_FEWEST_ARCS, _ARCS_PER_POINT * sum(cost.shape)))]
    # Under a strong penalty the optimum is near the balanced one.
    share = rho / (rho + (a @ cost @ b or 1.0))
    plan *= 1 - share
    plan[balanced.indices[0], balanced.indices[1]] += share * balanced.masses
    return indices, plan[indices[0], indices[1]], bound, best_v


def _multiplicative(
    problem: _Penalised, max_iterations: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A plan's indices (2, nnz), in row-major order, its masses (nnz,), and the v (M,) of the best bound."""
    cost = problem.cost
    indices, masses, bound, best_v = _start(problem)
    done, stretch = 0, _FIRST_STRETCH
    while True:
        count = min(stretch, max_iterations - done)
        indices, masses = _iterate(problem, indices, masses, count)
        done, stretch = done + count, min(2 * stretch, _LONGEST_STRETCH)
        u, v = problem.prices(indices, masses)
        for candidate in (v, (cost - u[:, None]).min(axis=0)):
            lower, candidate = problem.dual(candidate)
            if lower > bound:
                bound, best_v = lower, candidate
        value = problem.primal(indices, masses)
        if value - bound <= max(tolerance * value, _EXACT) or done >= max_iterations:
            break
        # Adding these arcs reduces the objective.
        slack = cost - u[:, None] - v
        slack[indices[0], indices[1]] = 0.0
        missing = np.flatnonzero(slack < 0)
        missing = missing[smallest_places(slack.ravel()[missing], _MORE_ARCS_PER_POINT * sum(cost.shape))]
        row, column = np.unravel_index(missing, cost.shape)
        indices = np.concatenate((indices, (row, column)), axis=1)
        masses = np.concatenate((masses, problem.a[row] * problem.b[column]))
    order = np.lexsort(indices[::-1])
    return indices[:, order], masses[order], best_v


def _iterate(
    problem: _Penalised, indices: np.ndarray, masses: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and masses of the plan after iterations of `ot.unbalanced.mm_unbalanced` restricted to its arcs.

    No iteration increases the objective.
    """
    row, column = indices
    kernel = np.sqrt(problem.a[row] * problem.b[column]) * np.exp(-problem.cost[row, column] / (2 * problem.rho))
    present = (masses > _VANISHED) & (kernel > 0)
    indices, masses, kernel = indices[:, present], masses[present], kernel[present]
    row, column = indices
    for _ in range(count):
        row_mass, column_mass = plan_marginals(indices, masses, problem.cost.shape)
        # Rows far beyond the penalty may underflow to 0; their mass stays 0.
        masses = masses * kernel / np.maximum(np.sqrt(row_mass[row] * column_mass[column]), _TINY)
    return indices, masses
